"""side_attention beside torch's own fused attention, forward and backward, as a step pays it.

Heads of a side network are 8 channels wide; torch's kernels are made for wider ones.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import counts
from benchmarks.cases import Sizes
from benchmarks.contest import Contest, Result, cpu_implementations
from fpt_fast.ops import side_attention

# Images, heads, queries, tokens with prompts, head width: the side inputs as published.
CASES = {"fpt_plus": (16, 12, 65, 81, 8), "fpt": (16, 12, 197, 213, 8)}
TINY = {"fpt_plus": (2, 3, 17, 21, 8), "fpt": (2, 3, 33, 37, 8)}


def contest(case: str, sizes: Sizes) -> Contest:
    """One layer of a batch, with the gradients to q, k and v."""
    shape = (CASES if sizes.size == "full" else TINY)[case]
    images, heads, queries, tokens, width = shape
    packed = torch.randn(images, tokens, 3, heads, width, generator=sizes.generator(0))
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    leaves = [x.detach().requires_grad_() for x in (q[:, :, :queries], k, v)]
    grad = torch.randn(images, queries, heads, width, generator=sizes.generator(1)).transpose(1, 2)

    def both_ways(attend: Callable[..., Tensor]) -> Result:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    def plain() -> Result:
        return both_ways(functional.scaled_dot_product_attention)

    def check(result: Result) -> None:
        for got, expected in zip(result, plain(), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    return Contest(
        op="side_attention",
        group="side_attention, forward and backward",
        case=case,
        dtype="float32",
        ours=lambda impl: both_ways(lambda q, k, v: side_attention(q, k, v, impl=impl)),
        plain=plain,
        check=check,
        count=counts.side_attention(images * heads, queries, tokens, width),
    )


@pytest.mark.parametrize("impl", cpu_implementations("side_attention"))
@pytest.mark.parametrize("case", CASES)
def bench_side_attention(
    beside: Callable[[Contest, str], None], sizes: Sizes, case: str, impl: str
) -> None:
    beside(contest(case, sizes), impl)
