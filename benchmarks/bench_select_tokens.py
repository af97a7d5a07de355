"""select_tokens: the implementations side by side, as preloading calls it, with f16 copies."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import cpu_implementations, frozen_case
from fpt_fast.ops import reference, select_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", cpu_implementations("select_tokens"))
@pytest.mark.benchmark(group="select_tokens")
def bench_select_tokens(
    benchmark: BenchmarkFixture, full: bool, impl: str, dtype: torch.dtype
) -> None:
    case = frozen_case(full)
    _, k, v = case.qkv(dtype)
    scores = torch.rand(k.shape[:3], generator=torch.Generator().manual_seed(0))
    kv, index = benchmark(select_tokens, scores, k, v, case.keep, impl=impl, dtype=torch.float16)
    expected, expected_index = reference.select_tokens(scores, k, v, case.keep)
    assert torch.equal(index, expected_index) and torch.equal(kv, expected.half())
    benchmark.extra_info["case"] = case.name
    benchmark.extra_info["flops"] = 0
    # Kept keys and values are read once and written once; scores are read, the index is written.
    read = kv.numel() * k.element_size() + scores.nbytes
    benchmark.extra_info["bytes"] = read + kv.nbytes + index.nbytes
