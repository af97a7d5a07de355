"""side_layers of plain tensors, a function of autograd, beside the op that it stands for."""

import pytest
import torch
from torch import Tensor

from fpt_fast.ops import SideWeights, side_layers
from helpers import SeenOps, assert_tensors_equal, implementations_here

LEVELS = [impl for impl in implementations_here("side_layers") if impl.startswith("native/")]
SIZES = ((12,), (12,), (36, 12), (36,), (12, 12), (12,), (12,), (12,), (20, 12), (20,), (12, 20))
LAYERS, OPS = 2, {"fpt.side_layers.default", "fpt.side_layers_backward.default"}


def leaves() -> list[Tensor]:
    """Tokens, states and the weights of two layers."""
    shapes = [(2, 5, 12), (LAYERS, 2, 3, 12), *([*SIZES, (12,)] * LAYERS)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def run(given: list[Tensor], impl: str) -> Tensor:
    tokens, states, *weights = given
    layers = [SideWeights(*weights[12 * i : 12 * i + 12]) for i in range(LAYERS)]
    return side_layers(tokens, states, layers, heads=3, queries=1, impl=impl)


def with_gradients(given: list[Tensor], impl: str) -> list[Tensor]:
    out = run(given, impl)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), given)]


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_who_watches_sees_the_op_and_the_same_bits(impl: str) -> None:
    given = leaves()
    directly = with_gradients(given, impl)
    with SeenOps() as names:
        assert_tensors_equal(with_gradients(given, impl), directly)
    assert names.seen >= OPS


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_plain_tensors_do_without_the_op(impl: str) -> None:
    given = leaves()
    out = run(given, impl)
    with SeenOps() as names:  # too late for the forward
        out.sum().backward()
    assert not names.seen & OPS
    assert all(leaf.grad is not None for leaf in given)
    with torch.no_grad():
        assert_tensors_equal([run(given, impl)], [out.detach()])


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_frozen_weights_and_a_frozen_input_have_no_gradient(impl: str) -> None:
    given, expected = leaves(), with_gradients(leaves(), impl)[1:]
    for leaf in given[::2]:
        leaf.requires_grad_(False)
    run(given, impl).sin().sum().backward()
    for leaf, gradient in zip(given, expected, strict=True):
        if leaf.requires_grad:
            assert leaf.grad is not None and torch.equal(leaf.grad, gradient)
        else:
            assert leaf.grad is None


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_there_is_no_second_derivative(impl: str) -> None:
    given = leaves()
    (grad,) = torch.autograd.grad(run(given, impl).sin().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", LEVELS[:1], indirect=True)
def test_transforms_see_the_op(impl: str) -> None:
    """A transform that the op does not know is refused as the op's, not by half."""
    given = leaves()
    with pytest.raises(RuntimeError, match="fpt"):
        torch.func.vmap(lambda tokens: run([tokens, *given[1:]], impl))(given[0].unsqueeze(0))
