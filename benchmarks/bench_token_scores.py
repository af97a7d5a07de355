"""token_scores: every implementation beside the plain expression, and beside attention itself.

``pytest --benchmark-only benchmarks/bench_token_scores.py`` measures a tiny layer, ``--full`` one
layer of ViT-B at 512 px.
"""

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.cases import FrozenCase, cpu_implementations, frozen_case
from fpt_fast.ops import attention_with_scores, reference, token_scores

DTYPES = (torch.float32, torch.bfloat16)


def note(benchmark: BenchmarkFixture, case: FrozenCase, products: int, q: Tensor) -> None:
    """Counted work; bytes are of the op's own tensors, each once."""
    benchmark.extra_info["case"] = case.name
    benchmark.extra_info["flops"] = products * case.map_flops
    benchmark.extra_info["exponentials"] = case.map_exponentials
    benchmark.extra_info["bytes"] = 2 * q.numel() * q.element_size() + 4 * q[..., 0].numel()


def check_scores(scores: Tensor, q: Tensor, k: Tensor) -> None:
    """By what holds at every size: non-negative, and a sum of 1; and where small, the oracle."""
    assert bool((scores >= 0).all())
    torch.testing.assert_close(scores.sum(-1), torch.ones_like(scores[..., 0]), rtol=1e-2, atol=0)
    if q.shape[2] <= 64:
        oracle = reference.token_scores(q.double(), k.double()).float()
        torch.testing.assert_close(scores, oracle, rtol=2e-2, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["plain", *cpu_implementations("token_scores")])
@pytest.mark.benchmark(group="token_scores")
def bench_token_scores(
    benchmark: BenchmarkFixture, full: bool, impl: str, dtype: torch.dtype
) -> None:
    case = frozen_case(full)
    q, k, _ = case.qkv(dtype)
    note(benchmark, case, 1, q)
    if impl == "plain":
        scores = benchmark(reference.token_scores, q, k).float()
    else:
        scores = benchmark(token_scores, q, k, impl=impl)
    check_scores(scores, q, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.benchmark(group="token_scores, log-sum-exp given")
def bench_token_scores_from_lse(
    benchmark: BenchmarkFixture, full: bool, dtype: torch.dtype
) -> None:
    case = frozen_case(full)
    q, k, v = case.qkv(dtype)
    _, _, lse = attention_with_scores(q, k, v, need_scores=False)
    note(benchmark, case, 1, q)
    check_scores(benchmark(token_scores, q, k, lse=lse), q, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["attention_alone", "attention_with_scores"])
@pytest.mark.benchmark(group="attention, and token_scores on its way")
def bench_attention_with_scores(
    benchmark: BenchmarkFixture, full: bool, way: str, dtype: torch.dtype
) -> None:
    case = frozen_case(full)
    q, k, v = case.qkv(dtype)
    note(benchmark, case, 2, q)
    expected = F.scaled_dot_product_attention(q, k, v)
    if way == "attention_alone":
        out = benchmark(F.scaled_dot_product_attention, q, k, v)
    else:
        out, scores, _ = benchmark(attention_with_scores, q, k, v)
        check_scores(scores, q, k)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
