"""Schema of ``trained_linear``, with its gradient."""

from typing import Any

from torch import Tensor

from fpt_fast.ops.direct import call
from fpt_fast.ops.implementation import resolve
from fpt_fast.ops.schemas import define, with_gradient, without_gradient


def _trained_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, impl: str
) -> Tensor:
    args = (x, weight, bias, added)
    out: Tensor = resolve("trained_linear", impl, args).load()(*args)
    return out.contiguous()


def _trained_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None, impl: str
) -> Tensor:
    return weight.new_empty((*x.shape[: x.dim() - weight.dim() + 1], weight.shape[0]))


def _trained_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, added: Tensor | None, need_x: bool, impl: str
) -> tuple[Tensor, ...]:
    args = (grad, x, weight, added, need_x)
    grads = resolve("trained_linear_backward", impl, args).load()(*args)
    return tuple(part.contiguous() for part in grads)


def _trained_linear_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, added: Tensor | None, need_x: bool, impl: str
) -> tuple[Tensor, ...]:
    grad_x = x.new_empty(x.shape if need_x else (0,))
    grad_added = weight.new_empty(0) if added is None else added.new_empty(added.shape)
    return grad_x, weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1]), grad_added


def _save_trained_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, added, ctx.impl = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, added)


def _trained_linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, added = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]
    grads = call("trained_linear_backward", grad, x, weight, added, need_x, ctx.impl)
    grad_x, grad_weight, grad_bias, grad_added = grads
    return (
        grad_x if need_x else None,
        grad_weight,
        grad_bias if ctx.has_bias else None,
        None if added is None else grad_added,
        None,
    )


define(
    "trained_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? added, str impl) -> Tensor",
    _trained_linear,
    _trained_linear_fake,
)
define(
    "trained_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, Tensor? added, bool need_x, str impl)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_added)",
    _trained_linear_backward,
    _trained_linear_backward_fake,
)
with_gradient("trained_linear", _save_trained_linear, _trained_linear_gradient)
without_gradient("trained_linear_backward")
