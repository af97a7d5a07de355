"""frozen_attention: every implementation beside the plain expression and torch's own attention.

``pytest --benchmark-only benchmarks/bench_frozen_attention.py`` measures a tiny layer, ``--full``
one layer of ViT-B at 512 px.
"""

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import cpu_implementations, frozen_case
from fpt_fast.ops import frozen_attention, reference
from fpt_fast.ops.implementation import unsupported_reasons

DTYPES = (torch.float32, torch.bfloat16)
_Q = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
IMPLEMENTATIONS = [
    name
    for name in cpu_implementations("frozen_attention")
    if not unsupported_reasons("frozen_attention", name, _Q, _Q, _Q)
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["plain", "torch, without lse", *IMPLEMENTATIONS])
@pytest.mark.benchmark(group="frozen_attention")
def bench_frozen_attention(
    benchmark: BenchmarkFixture, full: bool, impl: str, dtype: torch.dtype
) -> None:
    case = frozen_case(full)
    q, k, v = case.qkv(dtype)
    benchmark.extra_info["case"] = case.name
    benchmark.extra_info["flops"] = 2 * case.map_flops
    benchmark.extra_info["exponentials"] = case.map_exponentials
    benchmark.extra_info["bytes"] = 4 * q.nbytes + 4 * q[..., 0].numel()
    if impl == "plain":
        out, lse = benchmark(reference.frozen_attention, q, k, v)
    elif impl == "torch, without lse":
        out, lse = benchmark(F.scaled_dot_product_attention, q, k, v), None
    else:
        out, lse = benchmark(frozen_attention, q, k, v, impl=impl)
    expected = reference.frozen_attention(q.float(), k.float(), v.float())
    torch.testing.assert_close(out.float(), expected[0], rtol=2e-2, atol=2e-2)
    if lse is not None:
        torch.testing.assert_close(lse.float(), expected[1], rtol=1e-2, atol=0)
