"""prompt_attention_indexed: tokens gathered from the frozen layers' own keys and values."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks import counts
from benchmarks.bench_prompt_attention import assert_near
from benchmarks.cases import FrozenCase, PromptCase, Sizes
from benchmarks.contest import Contest, Planned, Result, cpu_implementations, planned
from fpt_fast.ops import library, prompt_attention_indexed, reference

FORMS = ("prompt_attention_indexed", "prompt_attention_indexed, backward")
DTYPES = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16))
GPU_DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16))


def contests(sizes: Sizes) -> Iterator[Planned]:
    """Forward and backward of every pair of dtypes: prompts, tokens."""
    for case in sizes.prompt:
        for form in FORMS:
            for dtype, kv_dtype in GPU_DTYPES if sizes.size == "gpu" else DTYPES:
                yield planned(contest, form, case, dtype, kv_dtype, sizes)


def contest(
    form: str, case: PromptCase, dtype: torch.dtype, kv_dtype: torch.dtype, sizes: Sizes
) -> Contest:
    """The tokens of a batch of images, all layers at once."""
    is_forward = form == FORMS[0]
    tokens = sizes.frozen[0].tokens
    frozen = FrozenCase("", case.layers * case.images, case.heads, tokens, case.width, case.kept)
    packed = frozen.qkv(kv_dtype, device=sizes.device)
    _, k, v = (x.unflatten(0, (case.layers, case.images)) for x in packed)
    shape = (case.images, case.layers, case.heads, tokens)
    ranks = torch.rand(shape, generator=sizes.generator(0), device=sizes.device)
    index = ranks.argsort(-1)[..., : case.kept].sort(-1).values.int()
    q = case.q(dtype, device=sizes.device)
    out, lse = reference.prompt_attention_indexed(q, k, v, index)
    grad = torch.randn(out.shape, generator=sizes.generator(2), device=sizes.device).to(dtype)

    def ours(impl: str) -> Result:
        if is_forward:
            return prompt_attention_indexed(q, k, v, index, impl=impl)
        saved = (grad, q, k, v, index, out, lse.float())
        grad_q: Tensor = library.ops.prompt_attention_indexed_backward(*saved, impl)
        return grad_q

    def plain(q: Tensor = q, grad: Tensor = grad) -> Result:
        if is_forward:
            return reference.prompt_attention_indexed(q, k, v, index)[0]
        return reference.prompt_attention_indexed_backward(grad, q, k, v, index)

    def check(result: Result) -> None:
        expected = plain(q.float(), grad.float())
        assert isinstance(expected, Tensor)
        assert_near(result, expected, dtype)

    return Contest(
        op=f"prompt_attention_indexed{'' if is_forward else '_backward'}",
        group=form,
        case=case.name,
        dtype=" ".join(str(x).removeprefix("torch.") for x in (dtype, kv_dtype)),
        ours=ours,
        plain=plain,
        check=check,
        count=counts.prompt_attention(case, dtype, kv_dtype, is_forward, not is_forward),
    )


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", cpu_implementations("prompt_attention_indexed"))
@pytest.mark.parametrize("form", FORMS)
def bench_prompt_attention_indexed(
    beside: Callable[[Contest, str], None],
    sizes: Sizes,
    form: str,
    impl: str,
    kv_dtype: torch.dtype,
) -> None:
    beside(contest(form, sizes.prompt[0], torch.float32, kv_dtype, sizes), impl)
