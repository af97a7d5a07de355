"""One layer of side_layers beside torch's own operations, both ways, as a step pays it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks import counts
from benchmarks.cases import Sizes
from benchmarks.contest import Contest, Result, cpu_implementations
from fpt_fast.ops import SideWeights, side_layers

# Images, tokens, prompts, width, heads, MLP width: the side networks as published.
CASES = {"fpt_plus": (16, 65, 16, 96, 12, 384), "fpt": (16, 197, 16, 96, 12, 384)}
TINY = {"fpt_plus": (2, 17, 4, 24, 3, 96), "fpt": (2, 33, 4, 24, 3, 96)}
PRODUCTS = ("float32", "bfloat16")


def contest(case: str, products: str, sizes: Sizes) -> Contest:
    """One layer of a batch, with the gradients to tokens, prompts and weights."""
    images, tokens, prompts, width, heads, hidden = (CASES if sizes.size == "full" else TINY)[case]
    generator = sizes.generator(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_()

    weights = SideWeights(
        *(random(width), random(width)),
        *(random(3 * width, width, scale=0.05), random(3 * width)),
        *(random(width, width, scale=0.05), random(width)),
        *(random(width), random(width)),
        *(random(hidden, width, scale=0.05), random(hidden)),
        *(random(width, hidden, scale=0.05), random(width)),
    )
    leaves = (random(images, tokens, width), random(images, prompts, width))
    grad = torch.randn(images, tokens, width, generator=generator)

    def both_ways(impl: str) -> Result:
        with torch.autocast("cpu", torch.bfloat16, enabled=products == "bfloat16"):
            tokens, states = leaves[0], leaves[1].unsqueeze(0)
            out = side_layers(tokens, states, [weights], heads=heads, products=products, impl=impl)
        return (out.detach(), *torch.autograd.grad(out, (*leaves, *weights), grad))

    def plain() -> Result:
        return both_ways("torch")

    def check(result: Result) -> None:
        for got, expected in zip(result, plain(), strict=True):
            error = (got - expected).norm() / expected.norm()
            assert float(error) < (1e-4 if products == "float32" else 3e-2)

    return Contest(
        op="side_layers",
        group="side_layers, forward and backward",
        case=case,
        dtype=products,
        ours=both_ways,
        plain=plain,
        check=check,
        count=counts.side_block(images, tokens, prompts, width, hidden),
    )


@pytest.mark.parametrize("impl", cpu_implementations("side_layers"))
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("case", CASES)
def bench_side_layers(
    beside: Callable[[Contest, str], None], sizes: Sizes, case: str, products: str, impl: str
) -> None:
    beside(contest(case, products, sizes), impl)
