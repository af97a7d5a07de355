"""prompt_attention on a GPU: budgets in every pair of dtypes, 8 bits too, beyond 2**31 elements."""

import pytest
import torch
from torch import Tensor

from benchmarks.cases import FULL_PROMPT_CASES, PROMPT_CASES, PromptCase
from fpt_fast.ops import reference
from fpt_fast.ops.reference import Scales
from fptkernels import prompt_attention as kernels
from helpers import assert_within_budget
from on_device import DTYPES, EIGHT_BIT_DTYPES, ON_GPU, REPEATS, many_images

pytestmark = pytest.mark.gpu

LARGE_CASES = (
    *FULL_PROMPT_CASES,
    PromptCase("one_kept", images=5, layers=2, heads=3, kept=1, width=64, prompts=16),
    PromptCase("512_prompts", images=4, layers=2, heads=12, kept=205, width=64, prompts=512),
    PromptCase("width_128", images=3, layers=1, heads=2, kept=819, width=128, prompts=16),
    PromptCase("width_8", images=3, layers=2, heads=3, kept=100, width=8, prompts=3),
)
TINY = PromptCase("tiny", images=2, layers=1, heads=2, kept=19, width=10, prompts=5)
CASES = (*PROMPT_CASES, *LARGE_CASES) if ON_GPU else (TINY,)
FPT_PLUS = FULL_PROMPT_CASES[0] if ON_GPU else TINY
# Of the one value of "one_of_each" the budget is luck where the scales are rounded too.
PAIRS = [(case, dtype) for case in CASES for dtype in DTYPES]
PAIRS += [(c, t) for c in CASES for t in EIGHT_BIT_DTYPES if c.name != "one_of_each"]


def store(
    case: PromptCase, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Scales | None]:
    """kv [M, L, 2, H, K, D], and for 8 bits scales that bring it back to about normal."""
    if dtype not in EIGHT_BIT_DTYPES:
        return case.kv(dtype).to(device), None
    values = case.kv(torch.float32) * 20
    kv = (values.round().clamp(-127, 127) if dtype == torch.int8 else values).to(dtype)
    shape = (case.images, case.layers, case.heads)
    k_scales, v_scales = (0.05 * (0.5 + torch.rand(*shape, n)) for n in (case.width, case.kept))
    return kv.to(device), (k_scales.to(device), v_scales.to(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "kv_dtype"), PAIRS, ids=lambda x: getattr(x, "name", str(x)))
def test_budget_and_repeats(
    case: PromptCase, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> None:
    kv, scales = store(case, kv_dtype, device)
    rows = torch.randint(case.images, (case.images + 1,), device=device)
    q = case.q(dtype).to(device)
    out, lse = kernels.prompt_attention(q, kv, rows, scales)
    oracle, oracle_lse = reference.prompt_attention(q.double(), kv, rows, scales)
    eager, eager_lse = reference.prompt_attention(q, kv, rows, scales)
    assert_within_budget(out, oracle, eager)
    assert_within_budget(lse, oracle_lse, eager_lse)
    grad = torch.randn(out.shape, device=device).to(dtype)
    grad_q = kernels.prompt_attention_backward(grad, q, kv, out, lse, rows, scales)
    oracle = reference.prompt_attention_backward(grad.double(), q.double(), kv, rows, scales)
    eager = reference.prompt_attention_backward(grad, q, kv, rows, scales)
    assert_within_budget(grad_q, oracle, eager, factor=3.0)
    for _ in range(REPEATS):
        assert torch.equal(kernels.prompt_attention(q, kv, rows, scales)[0], out)
        again = kernels.prompt_attention_backward(grad, q, kv, out, lse, rows, scales)
        assert torch.equal(again, grad_q)


@pytest.mark.parametrize("dtype", EIGHT_BIT_DTYPES[1:], ids=str)
def test_every_finite_fp8_value_is_read_exactly(dtype: torch.dtype, device: torch.device) -> None:
    """With one kept token the output is its value."""
    bits = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    value = bits[bits.float().isfinite()][:: 1 if ON_GPU else 16].to(device)
    kv = value.view(-1, 1, 1, 1, 1, 1).expand(-1, -1, 2, -1, -1, -1)
    scales = tuple(torch.full((len(value), 1, 1, 1), x, device=device) for x in (0.0, 1.0))
    q = torch.ones((1, 1, 1, 1), device=device)
    out, _ = kernels.prompt_attention(q, kv, None, scales)  # type: ignore[arg-type]
    assert torch.equal(out.flatten(), value.float())


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.int8], ids=str)
def test_rows_of_a_store_beyond_31_bits_of_elements(
    kv_dtype: torch.dtype, device: torch.device
) -> None:
    """What lies beyond is picked as from a small store of its own."""
    case = FPT_PLUS
    shape = (case.layers, 2, case.heads, case.kept, case.width)
    elements = case.kv_bytes(kv_dtype) // kv_dtype.itemsize // case.images
    images = many_images(elements, kv_dtype.itemsize)
    last = list(range(images - 3, images))
    kv = torch.zeros((images, *shape), dtype=kv_dtype, device=device)
    kv[last] = (torch.randn((3, *shape), device=device) * 20).to(kv_dtype)
    scales = None
    if kv_dtype == torch.int8:
        where = (images, case.layers, case.heads)
        scales = tuple(
            0.05 * (0.5 + torch.rand((*where, n), device=device)) for n in (case.width, case.kept)
        )
    rows = torch.tensor([last[2], last[0], 0, last[1], last[2]], device=device)
    q = case.q(torch.float16).to(device)
    small = None if scales is None else tuple(scale[rows] for scale in scales)
    out, lse = kernels.prompt_attention(q, kv, rows, scales)
    expected, _ = kernels.prompt_attention(q, kv[rows], None, small)
    assert torch.equal(out, expected)
    grad = torch.randn(out.shape, device=device).half()
    assert torch.equal(
        kernels.prompt_attention_backward(grad, q, kv, out, lse, rows, scales),
        kernels.prompt_attention_backward(grad, q, kv[rows], out, lse, None, small),
    )
