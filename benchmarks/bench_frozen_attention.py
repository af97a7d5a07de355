"""frozen_attention: every implementation beside the plain expression and torch's own attention.

``pytest --benchmark-only benchmarks/bench_frozen_attention.py`` measures a tiny layer, ``--full``
one layer of ViT-B at 512 px.
"""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import counts
from benchmarks.cases import FrozenCase, Sizes
from benchmarks.contest import Contest, Planned, Result, cpu_implementations, planned
from fpt_fast.ops import frozen_attention, reference
from fpt_fast.ops.implementation import implementations, unsupported_reasons
from fptkernels.launch_table import pad_width

GROUP = "frozen_attention"
DTYPES = (torch.float32, torch.bfloat16)
WITHOUT_LSE = "torch, without lse"
_Q = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)


def here(names: list[str], q: Tensor) -> list[str]:
    """Those of the implementations that run on such tensors."""
    return [name for name in names if not unsupported_reasons("frozen_attention", name, q, q, q)]


def contests(sizes: Sizes) -> Iterator[Planned]:
    """Every size and dtype; bf16 first."""
    for case in sizes.frozen:
        for dtype in reversed(DTYPES):
            yield planned(contest, GROUP, case, dtype, sizes)


def contest(group: str, case: FrozenCase, dtype: torch.dtype, sizes: Sizes) -> Contest:
    """One layer's attention; on a GPU everything that is not the kernel is a rival."""
    q, k, v = case.qkv(dtype, device=sizes.device)
    others = [name for name in implementations(GROUP) if name not in ("triton", "reference")]

    def ours(impl: str) -> Result:
        if impl == WITHOUT_LSE:
            return (F.scaled_dot_product_attention(q, k, v),)
        return frozen_attention(q, k, v, impl=impl)

    return Contest(
        op="frozen_attention",
        group=group,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        ours=ours,
        plain=lambda: reference.frozen_attention(q, k, v),
        check=lambda result: check_attention(result, q, k, v),
        count=counts.attention(case, dtype, products=2, passes=1),
        tunes=("frozen_attention", dtype, pad_width(case.width)),
        rivals={name: partial(ours, name) for name in [WITHOUT_LSE, *here(others, q)]},
    )


def check_attention(result: Result, q: Tensor, k: Tensor, v: Tensor) -> None:
    """The first image's output, and its log-sum-exp where there is one, like the oracle's."""
    expected = reference.frozen_attention(q[:1].float(), k[:1].float(), v[:1].float())
    for got, wanted in zip(result, expected, strict=False):
        torch.testing.assert_close(got[:1].float(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", [WITHOUT_LSE, *here(cpu_implementations("frozen_attention"), _Q)])
def bench_frozen_attention(
    beside: Callable[[Contest, str], None], sizes: Sizes, impl: str, dtype: torch.dtype
) -> None:
    beside(contest(GROUP, sizes.frozen[0], dtype, sizes), impl)
