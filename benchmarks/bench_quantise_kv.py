"""quantise_kv: the implementations side by side, on f16 features as a cache holds them."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import cpu_implementations, prompt_case
from fpt_fast.ops import quantise_kv, reference

DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", cpu_implementations("quantise_kv"))
@pytest.mark.benchmark(group="quantise_kv")
def bench_quantise_kv(
    benchmark: BenchmarkFixture, full: bool, impl: str, dtype: torch.dtype
) -> None:
    case = prompt_case(full)
    kv = case.kv(torch.float16)
    kv8, k_scales, v_scales = benchmark(quantise_kv, kv, dtype, impl=impl)
    expected = reference.quantise_kv(kv.float(), dtype)
    for got, wanted in zip((kv8, k_scales, v_scales), expected, strict=True):
        assert torch.equal(got.float(), wanted.float())
    benchmark.extra_info["case"] = case.name
    benchmark.extra_info["flops"] = 3 * kv.numel()  # a maximum, a product, a rounding
    benchmark.extra_info["bytes"] = kv.nbytes + kv8.nbytes + k_scales.nbytes + v_scales.nbytes
