"""trained_linear: patch embedding and the fusion's out_proj, both ways, beside torch's own.

Plain is what the model does without the op: patches cut out of the pixels, the map under autocast,
and torch's gradient.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import counts
from benchmarks.cases import Sizes
from benchmarks.contest import Contest, Result, cpu_implementations
from fpt_fast.ops import reference, trained_linear
from fpt_fast.ops.implementation import unsupported_reasons

# Images, rows and columns of patches, patch, O: FPT+ and FPT on ViT-B.
CASES = {"fpt_plus": (16, 8, 16, 96), "fpt": (16, 14, 16, 96)}
TINY = (2, 3, 16, 32)
# Layers, images, prompts, C, S: what the prompts read, with the prompts added.
FUSION, TINY_FUSION = (6, 16, 16, 768, 96), (2, 3, 4, 64, 32)
SMALLEST = torch.zeros(16, 32)
IMPLEMENTATIONS = [
    impl
    for impl in cpu_implementations("trained_linear")
    if not unsupported_reasons("trained_linear", impl, SMALLEST, SMALLEST, None)
]


def contest(case: str, sizes: Sizes) -> Contest:
    """Output and gradients to weight and bias; no pixel needs one."""
    images, edge, patch, columns = CASES[case] if sizes.size == "full" else TINY
    pixels = torch.randn(images, 3, edge * patch, edge * patch, generator=sizes.generator(0))
    view = pixels.view(images, 3, edge, patch, edge, patch).permute(0, 2, 4, 1, 3, 5)
    weight = torch.randn(columns, 3, patch, patch, generator=sizes.generator(1)) * 0.03
    bias = torch.randn(columns, generator=sizes.generator(2))
    grad = torch.randn(images, edge, edge, columns, generator=sizes.generator(3))
    leaves = weight.requires_grad_(), bias.requires_grad_()

    def with_gradients(out: Tensor) -> Result:
        return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))

    def plain() -> Result:
        rows = view.reshape(images, edge, edge, -1)
        with torch.autocast("cpu", torch.bfloat16):
            out = functional.linear(rows, weight.flatten(1), bias)
        return with_gradients(out)

    with torch.no_grad():
        out = reference.trained_linear(view, weight, bias)
        _, *gradients = reference.trained_linear_backward(grad, view, weight)

    def check(result: Result) -> None:
        assert isinstance(result, tuple)
        for got, exact in zip(result, (out, *gradients), strict=True):
            scale = float(exact.abs().max())
            torch.testing.assert_close(got.float(), exact, rtol=0, atol=2**-6 * scale)

    return Contest(
        op="trained_linear",
        group="trained_linear",
        case=case,
        dtype="bfloat16",
        ours=lambda impl: with_gradients(trained_linear(view, weight, bias, impl=impl)),
        plain=plain,
        check=check,
        count=counts.trained_linear(images * edge * edge, 3 * patch * patch, columns),
    )


def fusion_contest(sizes: Sizes) -> Contest:
    """Output and gradients to rows, weight, bias and what is added."""
    layers, images, prompts, depth, columns = FUSION if sizes.size == "full" else TINY_FUSION
    shape = (layers, images, prompts, depth)
    x = torch.randn(shape, generator=sizes.generator(0)).bfloat16().requires_grad_()
    weight = (torch.randn(columns, depth, generator=sizes.generator(1)) * 0.03).requires_grad_()
    bias = torch.randn(columns, generator=sizes.generator(2)).requires_grad_()
    added = torch.randn(layers, 1, prompts, depth, generator=sizes.generator(3)).requires_grad_()
    grad = torch.randn(*shape[:-1], columns, generator=sizes.generator(4))
    leaves = x, weight, bias, added

    def with_gradients(out: Tensor) -> Result:
        return (out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype)))

    def plain() -> Result:
        with torch.autocast("cpu", torch.bfloat16):
            out = functional.linear(x, weight, bias) + functional.linear(added, weight)
        return with_gradients(out)

    exact = with_gradients(reference.trained_linear(x.float(), weight, bias, added))

    def check(result: Result) -> None:
        assert isinstance(result, tuple) and isinstance(exact, tuple)
        for got, expected in zip(result, exact, strict=True):
            scale = float(expected.float().abs().max())
            torch.testing.assert_close(got.float(), expected.float(), rtol=0, atol=2**-5 * scale)

    return Contest(
        op="trained_linear",
        group="trained_linear",
        case="fusion",
        dtype="bfloat16",
        ours=lambda impl: with_gradients(trained_linear(x, weight, bias, added, impl=impl)),
        plain=plain,
        check=check,
        count=counts.trained_linear(layers * images * prompts, depth, columns, between=True),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [*CASES, "fusion"])
def bench_trained_linear(
    beside: Callable[[Contest, str], None], sizes: Sizes, case: str, impl: str
) -> None:
    beside(fusion_contest(sizes) if case == "fusion" else contest(case, sizes), impl)
