"""Ops of plain tensors, past torch.library, beside the ops that they stand for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.cases import PROMPT_CASES
from fpt_fast import ops
from fpt_fast.ops.direct import is_watched
from helpers import SeenOps, assert_tensors_equal

CASE = PROMPT_CASES[0]
# Reference is there on any machine; each op's best is what a step takes.
IMPLS = ("auto", "reference")


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def index() -> Tensor:
    shape = (CASE.images, CASE.layers, CASE.heads, CASE.kept)
    return torch.arange(CASE.kept, dtype=torch.int32).expand(shape).contiguous()


INDEXED = (CASE.layers, CASE.images, CASE.heads, CASE.kept, CASE.width)
KV, ROWS = CASE.kv(torch.float16), torch.tensor([1, 0])
K, V = draw(*INDEXED), draw(*INDEXED)
# What has gradients, and the op of it.
CALLS: dict[str, tuple[list[Tensor], Callable[..., Tensor]]] = {
    "prompt_attention": (
        [draw(CASE.layers, CASE.heads, CASE.prompts, CASE.width)],
        lambda q, impl: ops.prompt_attention(q, KV, ROWS, impl=impl),
    ),
    "prompt_attention_indexed": (
        [draw(CASE.layers, CASE.heads, CASE.prompts, CASE.width)],
        lambda q, impl: ops.prompt_attention_indexed(q, K, V, index(), impl=impl),
    ),
    "side_attention": (
        [draw(2, 3, 5, 8), draw(2, 3, 7, 8), draw(2, 3, 7, 8)],
        lambda q, k, v, impl: ops.side_attention(q, k, v, impl=impl),
    ),
    "trained_linear": (
        [draw(2, 5, 32), draw(48, 32), draw(48), draw(2, 1, 32)],
        # "auto" may be torch's own map, which is no op.
        lambda x, weight, bias, added, impl: ops.trained_linear(
            x, weight, bias, added, impl="reference" if impl == "reference" else best_linear()
        ),
    ),
}


def best_linear() -> str:
    x, weight, *_ = CALLS["trained_linear"][0]
    return (
        "native"
        if not ops.implementation.unsupported_reasons("trained_linear", "native", x, weight, None)
        else "reference"
    )


class Called(TorchFunctionMode):
    """Names of the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


def leaves(name: str) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in CALLS[name][0]]


def with_gradients(name: str, impl: str) -> list[Tensor]:
    given = leaves(name)
    out = CALLS[name][1](*given, impl=impl)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), given)]


def names_of(name: str) -> set[str]:
    return {f"fpt.{name}.default", f"fpt.{name}_backward.default"}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
def test_who_watches_sees_the_op_and_the_same_bits(name: str, impl: str) -> None:
    directly = with_gradients(name, impl)
    with SeenOps() as names:
        assert_tensors_equal(with_gradients(name, impl), directly)
    assert names.seen >= names_of(name)
    with Called() as called:
        assert_tensors_equal(with_gradients(name, impl), directly)
    assert f"fpt.{name}" in called.seen


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CALLS)
def test_plain_tensors_do_without_the_op(name: str, impl: str) -> None:
    given = leaves(name)
    out = CALLS[name][1](*given, impl=impl)
    assert out.grad_fn is not None and "Directly" in out.grad_fn.name()
    out.sum().backward()
    assert all(leaf.grad is not None for leaf in given)
    with torch.no_grad():
        assert_tensors_equal([CALLS[name][1](*given, impl=impl)], [out.detach()])


@pytest.mark.parametrize("name", CALLS)
def test_as_much_is_kept_for_the_gradient(name: str) -> None:
    def kept_bytes() -> int:
        storages: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            storages[storage._cdata] = storage
            return tensor.detach()

        given = leaves(name)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            CALLS[name][1](*given, impl="auto")
        return sum(storage.nbytes() for storage in storages.values())

    directly = kept_bytes()
    with SeenOps() as names:
        assert kept_bytes() == directly > 0
    assert names.seen & names_of(name)


@pytest.mark.parametrize("name", CALLS)
def test_there_is_no_second_derivative(name: str) -> None:
    given = leaves(name)
    out = CALLS[name][1](*given, impl="auto")
    (grad,) = torch.autograd.grad(out.sin().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{name}_backward has no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("name", CALLS)
def test_only_what_is_asked_for_has_a_gradient(name: str) -> None:
    given, expected = leaves(name), with_gradients(name, "auto")[1:]
    for leaf in given[1:]:
        leaf.requires_grad_(False)
    CALLS[name][1](*given, impl="auto").sin().sum().backward()
    assert given[0].grad is not None and torch.equal(given[0].grad, expected[0])
    assert all(leaf.grad is None for leaf in given[1:])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CALLS)
def test_transforms_see_the_op(name: str) -> None:
    """vmap knows nothing of a body, and takes the op once for each."""
    first, *others = CALLS[name][0]

    def run(x: Tensor) -> Tensor:
        return CALLS[name][1](x, *others, impl="auto")

    both = torch.func.vmap(run)(torch.stack((first, 2 * first)))
    assert_tensors_equal([both], [torch.stack((run(first), run(2 * first)))])


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:FutureWarning")
def test_tracers_and_subclasses_are_watchers() -> None:
    class Own(Tensor):
        pass

    plain = torch.ones(1)
    assert not is_watched(plain, torch.nn.Parameter(plain))
    assert is_watched(plain, plain.as_subclass(Own))
    seen = []
    torch.jit.trace(lambda x: (seen.append(is_watched(x)), x + 1)[1], plain, check_trace=False)
    assert seen == [True]
