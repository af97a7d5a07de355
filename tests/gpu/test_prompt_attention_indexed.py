"""prompt_attention_indexed on a GPU: budgets, equal to the stored form, beyond 2**31 elements."""

import pytest
import torch
from torch import Tensor

from benchmarks.cases import FULL_PROMPT_CASES, PROMPT_CASES, PromptCase
from fpt_fast.ops import reference
from fptkernels import prompt_attention as kernels
from helpers import assert_tensors_equal, assert_within_budget
from on_device import DTYPES, ON_GPU, REPEATS, many_images

pytestmark = pytest.mark.gpu

TINY = PromptCase("tiny", images=2, layers=1, heads=2, kept=19, width=10, prompts=5)
CASES = (*PROMPT_CASES, *FULL_PROMPT_CASES) if ON_GPU else (TINY,)
TOKENS = 1025 if ON_GPU else 41


def frozen_tokens(case: PromptCase, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    """k, v [L, B, H, N, D] as views of a packed projection, and which tokens are kept."""
    shape = (case.layers, case.images, TOKENS, 2, case.heads, case.width)
    k, v = torch.randn(shape, device=device).to(dtype).permute(3, 0, 1, 4, 2, 5)
    ranks = torch.rand((case.images, case.layers, case.heads, TOKENS), device=device)
    return k, v, ranks.argsort(-1)[..., : case.kept].sort(-1).values.int()


@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget_and_repeats(
    case: PromptCase, dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device
) -> None:
    k, v, index = frozen_tokens(case, kv_dtype, device)
    q = case.q(dtype).to(device)
    out, lse = kernels.prompt_attention_indexed(q, k, v, index)
    oracle, _ = reference.prompt_attention_indexed(q.double(), k, v, index)
    eager, _ = reference.prompt_attention_indexed(q, k, v, index)
    assert_within_budget(out, oracle, eager)
    grad = torch.randn(out.shape, device=device).to(dtype)
    grad_q = kernels.prompt_attention_indexed_backward(grad, q, k, v, index, out, lse)
    oracle = reference.prompt_attention_indexed_backward(grad.double(), q.double(), k, v, index)
    eager = reference.prompt_attention_indexed_backward(grad, q, k, v, index)
    assert_within_budget(grad_q, oracle, eager, factor=3.0)
    for _ in range(REPEATS):
        again = kernels.prompt_attention_indexed(q, k, v, index)
        assert_tensors_equal(again, (out, lse))


def test_more_than_31_bits_of_elements(device: torch.device) -> None:
    case = FULL_PROMPT_CASES[0] if ON_GPU else TINY
    layers, heads, width = case.layers, case.heads, case.width
    images = many_images(layers * TOKENS * 2 * heads * width, 2)
    shape = (layers, images, TOKENS, 2, heads, width)
    packed = torch.zeros(shape, dtype=torch.float16, device=device)
    packed[:, -1].normal_()
    k, v = packed.permute(3, 0, 1, 4, 2, 5)
    ranks = torch.rand((images, layers, heads, TOKENS), device=device)
    index = ranks.argsort(-1)[..., : case.kept].sort(-1).values.int()
    q = case.q(torch.float16).to(device)
    out, _ = kernels.prompt_attention_indexed(q, k, v, index)
    alone, _ = kernels.prompt_attention_indexed(q, k[:, -1:], v[:, -1:], index[-1:])
    assert torch.equal(out[:, -1:], alone)
