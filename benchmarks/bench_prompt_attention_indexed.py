"""prompt_attention_indexed: tokens gathered from the frozen layers' own keys and values."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import FrozenCase, cpu_implementations, frozen_case, prompt_case
from fpt_fast.ops import prompt_attention_indexed, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", cpu_implementations("prompt_attention_indexed"))
@pytest.mark.benchmark(group="prompt_attention_indexed")
def bench_prompt_attention_indexed(
    benchmark: BenchmarkFixture, full: bool, impl: str, dtype: torch.dtype
) -> None:
    case = prompt_case(full)
    tokens = frozen_case(full).tokens
    frozen = FrozenCase("", case.layers * case.images, case.heads, tokens, case.width, case.kept)
    _, k, v = (x.unflatten(0, (case.layers, case.images)) for x in frozen.qkv(dtype))
    generator = torch.Generator().manual_seed(0)
    ranks = torch.rand(case.images, case.layers, case.heads, tokens, generator=generator)
    index = ranks.argsort(-1)[..., : case.kept].sort(-1).values.int()
    q = case.q(torch.float32)
    out = benchmark(prompt_attention_indexed, q, k, v, index, impl=impl)
    expected, _ = reference.prompt_attention_indexed(q, k, v, index)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    benchmark.extra_info["case"] = case.name
    benchmark.extra_info["flops"] = case.forward_flops
    benchmark.extra_info["bytes"] = case.kv_bytes(dtype) + index.nbytes
