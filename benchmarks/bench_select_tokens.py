"""select_tokens: the implementations beside the plain expression, with f16 copies as preloading."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import counts
from benchmarks.cases import FrozenCase, Sizes
from benchmarks.contest import Contest, Planned, Result, cpu_implementations, planned
from fpt_fast.ops import reference, select_tokens
from fptkernels.launch_table import pad_width

GROUP = "select_tokens"
DTYPES = (torch.float32, torch.bfloat16)


def contests(sizes: Sizes) -> Iterator[Planned]:
    """Every size and dtype; bf16 first."""
    for case in sizes.frozen:
        for dtype in reversed(DTYPES):
            yield planned(contest, GROUP, case, dtype, sizes)


def contest(group: str, case: FrozenCase, dtype: torch.dtype, sizes: Sizes) -> Contest:
    """One layer's selection."""
    _, k, v = case.qkv(dtype, device=sizes.device)
    scores = torch.rand(k.shape[:3], generator=sizes.generator(0), device=sizes.device)

    def plain() -> Result:
        kv, index = reference.select_tokens(scores, k, v, case.keep)
        return kv.half(), index

    def check(result: Result) -> None:
        assert all(torch.equal(got, want) for got, want in zip(result, plain(), strict=True))

    return Contest(
        op="select_tokens",
        group=group,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        ours=lambda impl: select_tokens(scores, k, v, case.keep, impl=impl, dtype=torch.float16),
        plain=plain,
        check=check,
        count=counts.select_tokens(case, dtype, torch.float16),
        tunes=("select_tokens", dtype, pad_width(case.width)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", cpu_implementations("select_tokens"))
def bench_select_tokens(
    beside: Callable[[Contest, str], None], sizes: Sizes, impl: str, dtype: torch.dtype
) -> None:
    beside(contest(GROUP, sizes.frozen[0], dtype, sizes), impl)
