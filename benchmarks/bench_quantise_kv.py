"""quantise_kv: the implementations beside the plain expression, on f16 features as a cache has."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import counts
from benchmarks.cases import PromptCase, Sizes
from benchmarks.contest import Contest, Planned, Result, cpu_implementations, planned
from fpt_fast.ops import quantise_kv, reference
from fptkernels.launch_table import pad_width

GROUP = "quantise_kv"
DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def contests(sizes: Sizes) -> Iterator[Planned]:
    """Every size and 8-bit form."""
    for case in sizes.prompt:
        for dtype in DTYPES:
            yield planned(contest, GROUP, case, torch.float16, dtype, sizes)


def contest(
    group: str, case: PromptCase, kv_dtype: torch.dtype, dtype: torch.dtype, sizes: Sizes
) -> Contest:
    """A batch of records."""
    kv = case.kv(kv_dtype).to(sizes.device)

    def plain() -> Result:
        return reference.quantise_kv(kv.float(), dtype)

    def check(result: Result) -> None:
        for got, wanted in zip(result, plain(), strict=True):
            assert torch.equal(got.float(), wanted.float())

    return Contest(
        op="quantise_kv",
        group=group,
        case=case.name,
        dtype=" ".join(str(x).removeprefix("torch.") for x in (kv_dtype, dtype)),
        ours=lambda impl: quantise_kv(kv, dtype, impl=impl),
        plain=plain,
        check=check,
        count=counts.quantise_kv(case, kv_dtype),
        tunes=("quantise_kv", kv_dtype, pad_width(case.width)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", cpu_implementations("quantise_kv"))
def bench_quantise_kv(
    beside: Callable[[Contest, str], None], sizes: Sizes, impl: str, dtype: torch.dtype
) -> None:
    beside(contest(GROUP, sizes.prompt[0], torch.float16, dtype, sizes), impl)
