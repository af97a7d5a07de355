"""token_scores on a GPU: budgets in every dtype, up to 16,385 tokens, beyond 2**31 elements."""

import pytest
import torch
from torch import Tensor

from benchmarks.cases import FROZEN_CASES, FrozenCase
from fpt_fast.ops import reference, token_scores
from fpt_fast.records import Importance
from helpers import assert_within_budget
from on_device import DTYPES, ON_GPU, REPEATS, by_head, many_images, peak_added

pytestmark = pytest.mark.gpu

LARGE_CASES = (
    FrozenCase("vit_b_512px", 2, 12, 1025, 64, 205),
    FrozenCase("vit_b_1024px", 1, 12, 4097, 64, 819),
    FrozenCase("vit_b_2048px", 1, 2, 16385, 64, 3277),
    FrozenCase("width_128", 1, 3, 1025, 128, 205),
    FrozenCase("width_100", 2, 3, 577, 100, 115),
)
CASES = (*FROZEN_CASES, *LARGE_CASES) if ON_GPU else FROZEN_CASES[:2]
LAYER = LARGE_CASES[0] if ON_GPU else FROZEN_CASES[0]


def lse_of(q: Tensor, k: Tensor) -> Tensor:
    return (q.double() @ k.double().mT * q.shape[-1] ** -0.5).logsumexp(-1)


def scores_from(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """The plain expression with a given log-sum-exp, whose rounding is the giver's."""
    return (q @ k.mT * q.shape[-1] ** -0.5 - lse.to(q.dtype).unsqueeze(-1)).exp().mean(-2)


@pytest.mark.parametrize("importance", ["global", "class_token"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget_and_repeats(
    case: FrozenCase, dtype: torch.dtype, importance: Importance, device: torch.device
) -> None:
    q, k, _ = (tensor.to(device) for tensor in case.qkv(dtype))

    def plain(q: Tensor, k: Tensor) -> Tensor:
        return reference.token_scores(q, k, importance)

    scores = token_scores(q, k, importance=importance, impl="triton")
    oracle = by_head(lambda q, k: plain(q.double(), k.double()), q, k)
    assert_within_budget(scores, oracle, by_head(plain, q, k))
    for _ in range(REPEATS):
        assert torch.equal(token_scores(q, k, importance=importance, impl="triton"), scores)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget_with_lse_given(case: FrozenCase, dtype: torch.dtype, device: torch.device) -> None:
    q, k, _ = (tensor.to(device) for tensor in case.qkv(dtype))
    lse = by_head(lse_of, q, k).float()
    scores = token_scores(q, k, lse=lse, impl="triton")
    oracle = by_head(lambda q, k, lse: scores_from(q.double(), k.double(), lse), q, k, lse)
    assert_within_budget(scores, oracle, by_head(scores_from, q, k, lse))
    for _ in range(REPEATS):
        assert torch.equal(token_scores(q, k, lse=lse, impl="triton"), scores)


def test_memory_is_that_of_the_result_and_little_more(device: torch.device) -> None:
    q, k, _ = (tensor.to(device) for tensor in LAYER.qkv(DTYPES[-1]))
    results = 3 * 4 * q[..., 0].numel()  # scores, row maxima, inverse row sums
    assert peak_added(lambda: token_scores(q, k, impl="triton")) <= results + (16 << 20)


def test_more_than_31_bits_of_elements(device: torch.device) -> None:
    """Heads of the last image, in a packed projection that a 32-bit offset cannot reach."""
    tokens, heads, width = (16385, 12, 64) if ON_GPU else (37, 2, 8)
    images = many_images(tokens * 3 * heads * width, 2)
    packed = torch.empty((images, tokens, 3, heads, width), dtype=torch.float16, device=device)
    packed[: images - 1] = 0
    packed[-1].normal_()
    q, k, _ = packed.permute(2, 0, 3, 1, 4)
    scores = token_scores(q, k, impl="triton")
    alone = token_scores(q[-1:].contiguous(), k[-1:].contiguous(), impl="triton")
    assert torch.equal(scores[-1:], alone)
