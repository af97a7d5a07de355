"""frozen_linear: a frozen block's four maps, with what comes after each, beside torch's own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import counts
from benchmarks.cases import Sizes
from benchmarks.contest import Contest, Result, cpu_implementations
from fpt_fast.ops import frozen_linear, reference
from fpt_fast.ops.implementation import unsupported_reasons

# I, O in widths of the model, and what comes after: ViT-B at 512 px.
CASES = {
    "qkv": (1, 3, "nothing"),
    "proj": (1, 1, "residual"),
    "fc1": (1, 4, "gelu"),
    "fc2": (4, 1, "residual"),
}
SMALLEST = torch.zeros(32, 32, dtype=torch.bfloat16)
IMPLEMENTATIONS = [
    impl
    for impl in cpu_implementations("frozen_linear")
    if not unsupported_reasons("frozen_linear", impl, SMALLEST, SMALLEST)
]


def contest(case: str, sizes: Sizes) -> Contest:
    """One map of one image's tokens in bf16; plain: torch's operations, one after the other."""
    depth, columns, after = CASES[case]
    rows, width = (1025, 768) if sizes.size == "full" else (37, 64)
    depth, columns = depth * width, columns * width
    dtype = torch.bfloat16

    def normal(seed: int, *shape: int) -> Tensor:
        return torch.randn(shape, generator=sizes.generator(seed))

    x, bias = normal(0, rows, depth).to(dtype), normal(1, columns).to(dtype)
    weight = (normal(2, columns, depth) * depth**-0.5).to(dtype)
    rest: dict[str, Any] = {"activation": "gelu"} if after == "gelu" else {}
    if after == "residual":
        rest["residual"] = normal(3, rows, columns).to(dtype)
    wide = {name: t.float() if isinstance(t, Tensor) else t for name, t in rest.items()}
    exact = reference.frozen_linear(x.float(), weight.float(), bias.float(), **wide)

    def check(result: Result) -> None:
        assert isinstance(result, Tensor)
        torch.testing.assert_close(result.float(), exact, rtol=2**-6, atol=2**-5)

    return Contest(
        op="frozen_linear",
        group="frozen_linear",
        case=case,
        dtype="bfloat16",
        ours=lambda impl: frozen_linear(x, weight, bias, **rest, impl=impl),
        plain=lambda: frozen_linear(x, weight, bias, **rest, impl="torch"),
        check=check,
        count=counts.frozen_linear(rows, depth, columns, dtype, after == "residual"),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def bench_frozen_linear(
    beside: Callable[[Contest, str], None], sizes: Sizes, case: str, impl: str
) -> None:
    beside(contest(case, sizes), impl)
