"""select_tokens on a GPU: exact copies in every dtype, up to 16,385 tokens, over 2**31 elements."""

import pytest
import torch

from benchmarks.cases import FROZEN_CASES, FrozenCase
from fpt_fast.ops import reference, select_tokens
from fptkernels.select_tokens import select_tokens as kernel
from helpers import assert_tensors_equal
from on_device import DTYPES, ON_GPU, REPEATS, many_images

pytestmark = pytest.mark.gpu

LARGE_CASES = (
    FrozenCase("vit_b_512px", 2, 12, 1025, 64, 205),
    FrozenCase("vit_b_1024px", 2, 12, 4097, 64, 819),
    FrozenCase("vit_b_2048px", 1, 12, 16385, 64, 3277),
    FrozenCase("all_of_16385", 1, 1, 16385, 8, 16385),
)
CASES = (*FROZEN_CASES, *LARGE_CASES) if ON_GPU else FROZEN_CASES[:2]
BIG = FrozenCase("", 1, 12, 1025, 64, 205) if ON_GPU else FROZEN_CASES[0]


@pytest.mark.parametrize("copies", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exact_with_many_ties(
    case: FrozenCase, dtype: torch.dtype, copies: torch.dtype, device: torch.device
) -> None:
    _, k, v = case.qkv(dtype)
    scores = torch.rand(k.shape[:-1]).mul(50).round()
    kv, index = reference.select_tokens(scores, k, v, case.keep)
    moved = [tensor.to(device) for tensor in (scores, k, v)]
    for _ in range(REPEATS):
        got = select_tokens(*moved, case.keep, dtype=copies, impl="triton")
        assert_tensors_equal((tensor.cpu() for tensor in got), (kv.to(copies), index))


def test_infinite_and_nan_scores(device: torch.device) -> None:
    """NaN counts as minus infinity; ties of both infinities go to the lower index."""
    case = FROZEN_CASES[0]
    _, k, v = case.qkv(torch.float16)
    scores = torch.rand(k.shape[:-1])
    scores[..., 5::3] = torch.inf
    scores[..., 1::4] = torch.nan
    scores[..., 2::5] = -torch.inf
    expected = reference.select_tokens(scores, k, v, case.keep)
    got = kernel(*(x.to(device) for x in (scores, k, v)), case.keep, torch.float16)
    assert_tensors_equal((tensor.cpu() for tensor in got), expected)


def test_more_than_31_bits_of_elements(device: torch.device) -> None:
    heads, tokens, width, keep = BIG.heads, BIG.tokens, BIG.width, BIG.keep
    images = many_images(tokens * 3 * heads * width, 2)
    packed = torch.empty((images, tokens, 3, heads, width), dtype=torch.float16, device=device)
    packed[: images - 1] = 0
    packed[-1].normal_()
    _, k, v = packed.permute(2, 0, 3, 1, 4)
    scores = torch.rand((images, heads, tokens), device=device)
    kv, index = select_tokens(scores, k, v, keep, impl="triton")
    expected = reference.select_tokens(scores[-1:], k[-1:], v[-1:], keep)
    assert_tensors_equal((kv[-1:], index[-1:]), expected)
