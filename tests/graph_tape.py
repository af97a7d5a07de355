"""A CUDA graph in simulation: what a step does is written down once, and done again on the same
tensors, without its Python.

A branch taken, a number read or a tensor made while it was written down is the same ever after, as
in a CUDA graph; so is every address.  What would make the host wait for a device, or copy from its
own memory, is refused, as a capture refuses it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense.default: "reads a number",
    aten.nonzero.default: "counts what is not zero",
    aten.masked_select.default: "counts what a mask selects",
    aten.equal.default: "compares tensors into a bool",
    aten.is_nonzero.default: "reads a bool",
    aten._unique2.default: "counts what is unique",
    aten.lift_fresh.default: "makes a tensor out of numbers of the host",
}


class HostWait(RuntimeError):
    """An operation that a captured step must not have."""


class Tape(TorchDispatchMode):
    """Writes down every operation within a ``with`` block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _WAITS:
            raise HostWait(f"{func} {_WAITS[func]}")
        if func is aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        ):
            raise HostWait(f"{func} counts what a mask selects")
        made = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, _tensors(made)))
        return made

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, made in self.calls:
                for old, new in zip(made, _tensors(func(*args, **kwargs)), strict=True):
                    if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.detach().copy_(new)


class TapeCapture:
    """A ``Capture``; ``tapes`` are those made so far, ``replays`` counts them."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replays = 0

    def __call__(self, body: Callable[[], None]) -> Callable[[], None]:
        body()  # warm-up, as a CUDA graph wants it
        with Tape() as tape:
            body()
        self.tapes.append(tape)

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_flatten(values)[0] if isinstance(value, Tensor)]
