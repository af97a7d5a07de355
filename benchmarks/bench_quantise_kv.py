"""quantise_kv: the implementations beside the plain expression, on f16 features as a cache has."""

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks import counts
from benchmarks.cases import PromptCase, Sizes
from benchmarks.contest import Contest, Result, cpu_implementations
from fpt_fast.ops import quantise_kv, reference
from fptkernels.launch_table import pad_width

DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def contests(sizes: Sizes) -> Iterator[Contest]:
    """Every size and 8-bit form."""
    for case in sizes.prompt:
        for dtype in DTYPES:
            yield contest(case, dtype, sizes)


def contest(case: PromptCase, dtype: torch.dtype, sizes: Sizes) -> Contest:
    """A batch of records."""
    kv = case.kv(torch.float16).to(sizes.device)

    def plain() -> Result:
        return reference.quantise_kv(kv.float(), dtype)

    def check(result: Result) -> None:
        for got, wanted in zip(result, plain(), strict=True):
            assert torch.equal(got.float(), wanted.float())

    return Contest(
        op="quantise_kv",
        group="quantise_kv",
        case=case.name,
        dtype=f"float16 {str(dtype).removeprefix('torch.')}",
        ours=lambda impl: quantise_kv(kv, dtype, impl=impl),
        plain=plain,
        check=check,
        count=counts.quantise_kv(case, torch.float16),
        tunes=("quantise_kv", torch.float16, pad_width(case.width)),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", cpu_implementations("quantise_kv"))
def bench_quantise_kv(
    beside: Callable[[Contest, str], None], sizes: Sizes, impl: str, dtype: torch.dtype
) -> None:
    beside(contest(sizes.prompt[0], dtype, sizes), impl)
