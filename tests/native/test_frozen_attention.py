"""The C++ attention of frozen layers, at every level: blocks, infinities, threads, tiles."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.cases import FrozenCase
from fpt_fast.ops import attention_with_scores, reference, token_scores
from helpers import assert_tensors_equal, assert_within_budget, implementations_here

LEVELS = [x for x in implementations_here("frozen_attention") if x.startswith("native/")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def all_three(q: Tensor, k: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    out, scores, lse = attention_with_scores(q, k, v, impl=impl)
    assert out is not None and scores is not None and lse is not None
    return out, scores, lse


def plain(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out, lse = reference.frozen_attention(q, k, v)
    return out, reference.token_scores(q, k), lse


def assert_budget(q: Tensor, k: Tensor, v: Tensor, impl: str) -> None:
    oracle = plain(q.double(), k.double(), v.double())
    for got, wide, eager in zip(all_three(q, k, v, impl), oracle, plain(q, k, v), strict=True):
        assert_within_budget(got, wide, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", LEVELS, indirect=True)
@pytest.mark.parametrize(
    ("tokens", "width"), [(1100, 3), (417, 64), (385, 80), (70, 145), (33, 32), (9, 300)]
)
def test_budget_of_large_maps_and_wide_heads(
    tokens: int, width: int, impl: str, dtype: torch.dtype
) -> None:
    """Several blocks, parts and panels, with and without a rest."""
    assert_budget(*FrozenCase("", 1, 2, tokens, width, 1).qkv(dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_budget_where_every_block_has_higher_logits(impl: str, dtype: torch.dtype) -> None:
    """From -20 to 20 along the keys: what was summed up before loses its weight again and again."""
    q, k, v = FrozenCase("", 1, 1, 1100, 16, 1).qkv(dtype)
    q = q.clone()
    q[..., 0] = 4
    k = k.clone()
    k[..., 0] = torch.linspace(-20, 20, 1100)
    assert_budget(q, k, v, impl)
    assert_budget(q, k.flip(2), v.flip(2), impl)


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_views_of_any_strides_give_the_same_bits(impl: str) -> None:
    for dtype in DTYPES:
        q, k, v = FrozenCase("", 2, 2, 45, 37, 1).qkv(dtype)
        apart = [x.mT.contiguous().mT for x in (q, k, v)]
        assert apart[0].stride(-1) != 1
        assert_tensors_equal(all_three(*apart, impl), all_three(q, k, v, impl))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_infinity_and_nan_are_those_of_softmax(impl: str, dtype: torch.dtype) -> None:
    """The first 500 keys cannot be seen, one later key takes all, and one query is NaN."""
    q, k, v = (x.contiguous() for x in FrozenCase("", 1, 1, 1100, 8, 1).qkv(dtype))
    q = q.abs() + 0.125
    k[..., :500, :] = -math.inf
    k[..., 700, 0] = 2.0**30
    out, scores, lse = all_three(q, k, v, impl)
    assert bool((scores[..., :500] == 0).all()) and bool(lse.isfinite().all())
    assert float(scores[0, 0, 700]) == pytest.approx(1, rel=1e-6)
    of_one_key = v[..., 700:701, :].expand_as(out)
    torch.testing.assert_close(out, of_one_key, rtol=torch.finfo(dtype).eps, atol=0)
    q[..., 77, 3] = math.nan
    with_nan, scores, lse = all_three(q, k, v, impl)
    lost = torch.zeros(1100, dtype=torch.bool)
    lost[77] = True
    assert torch.equal(lse.isnan()[0, 0], lost)
    assert torch.equal(with_nan.isnan()[0, 0], lost.unsqueeze(-1).expand(-1, 8))
    assert torch.equal(with_nan[0, 0, ~lost], out[0, 0, ~lost])
    assert bool(scores.isnan().all())


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_results_do_not_depend_on_the_number_of_threads(impl: str) -> None:
    threads = torch.get_num_threads()
    try:
        for dtype in DTYPES:
            q, k, v = FrozenCase("", 1, 3, 1100, 24, 1).qkv(dtype)
            results = []
            for count in (1, 2, 5):
                torch.set_num_threads(count)
                given = all_three(q, k, v, impl)
                results.append([*given, token_scores(q, k, lse=given[2], impl=impl)])
            assert_tensors_equal(results[0], results[1])
            assert_tensors_equal(results[0], results[2])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_torch_finds_its_own_tiles_unchanged(impl: str) -> None:
    """Its products of bf16 use the same registers where there are any."""
    q, k, v = FrozenCase("", 1, 2, 130, 64, 1).qkv(torch.bfloat16)
    projection = torch.randn(64, 64, dtype=torch.bfloat16)

    def of_torch() -> list[Tensor]:
        return [scaled_dot_product_attention(q, k, v), q @ projection]

    before, ours = of_torch(), all_three(q, k, v, impl)
    for _ in range(3):
        assert_tensors_equal(of_torch(), before)
        assert_tensors_equal(all_three(q, k, v, impl), ours)
