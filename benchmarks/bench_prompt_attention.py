"""prompt_attention: the implementations beside the plain expression, each way and both together.

``prompt_attention_indexed`` is measured in ``bench_prompt_attention_indexed.py``.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import counts
from benchmarks.cases import PromptCase, Sizes
from benchmarks.contest import Contest, Planned, Result, cpu_implementations, planned
from fpt_fast.ops import library, prompt_attention, reference
from fpt_fast.ops.reference import Scales
from fptkernels.launch_table import pad_width

FORWARD, BACKWARD, BOTH = (
    "prompt_attention",
    "prompt_attention, backward",
    "prompt_attention, forward and backward",
)
# Prompts and features: training on a CPU, and on a GPU by dtype of the cache.
DTYPES = (
    (torch.float32, torch.float16),
    (torch.float32, torch.float32),
    (torch.float32, torch.int8),
)
GPU_DTYPES = (
    (torch.bfloat16, torch.float16),
    (torch.bfloat16, torch.int8),
    (torch.bfloat16, torch.float8_e4m3fn),
    (torch.float16, torch.float16),
    (torch.float32, torch.float16),
)
# A resident cache far larger than any L2, out of which a batch is picked.
STORE_BYTES = 2 << 30


def contests(sizes: Sizes) -> Iterator[Planned]:
    """Forward, then backward, of every pair of dtypes."""
    for case in sizes.prompt:
        for form in (FORWARD, BACKWARD):
            for dtype, kv_dtype in GPU_DTYPES if sizes.size == "gpu" else DTYPES:
                yield planned(contest, form, case, dtype, kv_dtype, sizes)


def store(
    case: PromptCase, kv_dtype: torch.dtype, sizes: Sizes
) -> tuple[Tensor, Tensor, Scales | None]:
    """kv of a resident cache, rows of one batch out of it, and scales of 8-bit features."""
    record = case.kv_bytes(kv_dtype) // case.images
    images = max(2 * case.images, STORE_BYTES // record) if sizes.size == "gpu" else case.images
    shape = (images, case.layers, 2, case.heads, case.kept, case.width)
    kv = torch.empty(shape, dtype=kv_dtype, device=sizes.device)
    for first in range(0, images, 64):
        part = torch.randn(
            kv[first : first + 64].shape, generator=sizes.generator(first), device=sizes.device
        )
        kv[first : first + 64] = part if kv_dtype.itemsize > 1 else (part * 20).clamp(-127, 127)
    rows = torch.randperm(images, generator=sizes.generator(1), device=sizes.device)
    if kv_dtype.itemsize > 1:
        return kv, rows[: case.images], None
    widths = (case.width, case.kept)
    k_scales, v_scales = (
        0.05 + 0.05 * torch.rand((*shape[:2], case.heads, n), device=sizes.device) for n in widths
    )
    return kv, rows[: case.images], (k_scales, v_scales)


def contest(
    form: str, case: PromptCase, dtype: torch.dtype, kv_dtype: torch.dtype, sizes: Sizes
) -> Contest:
    """A batch of records out of a resident cache."""
    kv, rows, scales = store(case, kv_dtype, sizes)
    q = case.q(dtype, device=sizes.device)
    out, lse = reference.prompt_attention(q, kv, rows, scales)
    grad = torch.randn(out.shape, generator=sizes.generator(2), device=sizes.device).to(dtype)
    k_scales, v_scales = scales or (None, None)
    saved = (grad, q, kv, out, lse.float(), rows, k_scales, v_scales)

    def forward(impl: str) -> Result:
        return prompt_attention(q, kv, rows, scales, impl=impl)

    def backward(impl: str) -> Result:
        grad_q: Tensor = library.ops.prompt_attention_backward(*saved, impl)
        return grad_q

    def check(result: Result) -> None:
        wide = (q.float(), kv, rows, scales)
        if form == FORWARD:
            expected, _ = reference.prompt_attention(*wide)
        else:
            expected = reference.prompt_attention_backward(grad.float(), *wide)
        assert_near(result, expected, dtype)

    is_forward = form == FORWARD
    return Contest(
        op=f"prompt_attention{'' if is_forward else '_backward'}",
        group=form,
        case=case.name,
        dtype=" ".join(str(x).removeprefix("torch.") for x in (dtype, kv_dtype)),
        ours=forward if is_forward else backward,
        plain=lambda: (
            reference.prompt_attention(q, kv, rows, scales)[0]
            if is_forward
            else reference.prompt_attention_backward(grad, q, kv, rows, scales)
        ),
        check=check,
        count=counts.prompt_attention(case, dtype, kv_dtype, is_forward, not is_forward),
        tunes=(
            f"prompt_attention{'' if is_forward else '_backward'}",
            dtype,
            pad_width(q.shape[3]),
        ),
    )


def both_ways(case: PromptCase, kv_dtype: torch.dtype, sizes: Sizes) -> Contest:
    """What a training step pays, plain by autograd: f32 prompts."""
    kv, rows, scales = store(case, kv_dtype, sizes)
    q = case.q(torch.float32, device=sizes.device).requires_grad_()
    shape = (case.layers, case.images, case.prompts, case.heads * case.width)
    grad = torch.randn(shape, generator=sizes.generator(2), device=sizes.device)

    def ours(impl: str) -> Result:
        return torch.autograd.grad(prompt_attention(q, kv, rows, scales, impl=impl), q, grad)

    def plain() -> Result:
        return torch.autograd.grad(reference.prompt_attention(q, kv, rows, scales)[0], q, grad)

    backward = contest(BACKWARD, case, torch.float32, kv_dtype, sizes)
    return replace(
        backward,
        op="prompt_attention",
        group=BOTH,
        ours=ours,
        plain=plain,
        check=lambda result: assert_near(result[0], plain()[0], torch.float32),
        count=counts.prompt_attention(case, torch.float32, kv_dtype, True, True),
        tunes=None,
    )


def assert_near(result: Result, expected: Tensor, dtype: torch.dtype) -> None:
    """As near as rounding allows; the tests hold the error budgets."""
    assert isinstance(result, Tensor)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    scale = float(expected.abs().max())
    torch.testing.assert_close(
        result.float(), expected, rtol=tolerance, atol=tolerance * max(scale, 1e-3)
    )


@pytest.mark.parametrize("kv_dtype", [kv_dtype for _, kv_dtype in DTYPES], ids=str)
@pytest.mark.parametrize("impl", cpu_implementations("prompt_attention"))
@pytest.mark.parametrize("form", [FORWARD, BACKWARD, BOTH])
def bench_prompt_attention(
    beside: Callable[[Contest, str], None],
    sizes: Sizes,
    form: str,
    impl: str,
    kv_dtype: torch.dtype,
) -> None:
    case = sizes.prompt[0]
    if form == BOTH:
        beside(both_ways(case, kv_dtype, sizes), impl)
    else:
        beside(contest(form, case, torch.float32, kv_dtype, sizes), impl)
