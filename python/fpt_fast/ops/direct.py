"""Ops of plain tensors in eager code, past ``torch.library``.

An op says what it does to all of torch, and pays for that: its gradient's way through lists, trees
and the dispatcher takes longer than small tensors do.  Where nobody watches, its body runs, as a
function of autograd where a gradient is asked for.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Save = Callable[[Any, tuple[Any, ...], Any], None]
Gradient = Callable[..., tuple[Any, ...]]


@dataclass(slots=True)
class _Op:
    """What ``torch.library`` was told of an op; no ``save`` and ``gradient``: no derivative."""

    body: Callable[..., Any]
    save: Save | None = None
    gradient: Gradient | None = None


_known: dict[str, _Op] = {}


def know(name: str, body: Callable[..., Any]) -> None:
    """``call`` may run ``body`` for ``fpt::name``."""
    _known[name] = _Op(body)


def know_gradient(name: str, save: Save, gradient: Gradient) -> None:
    """``fpt::name`` has this gradient, as ``torch.library.register_autograd`` takes it."""
    op = _known[name]
    op.save, op.gradient = save, gradient


def call(name: str, *args: Any) -> Any:
    """What ``fpt::name`` gives, whose tensors are arguments by themselves, in no list."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.fpt, name)(*args)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    op = _known[name]
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if is_watched(*tensors) or (needs_gradient and op.gradient is None):
        return getattr(torch.ops.fpt, name)(*args)
    return _Directly.apply(*args, op) if needs_gradient else op.body(*args)


def is_watched(*tensors: Tensor) -> bool:
    """Whether somebody must see the op itself: a compiler, a tracer, a transform, a mode or a
    subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._is_tracing()
        or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in tensors)
    )


class _Directly(torch.autograd.Function):
    # The op is the last argument, so that ctx.needs_input_grad counts as the op's does.
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *inputs, ctx.op = args
        output = ctx.op.body(*inputs)
        ctx.op.save(ctx, tuple(inputs), output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        return (*ctx.op.gradient(ctx, *grads), None)
