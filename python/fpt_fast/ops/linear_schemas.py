"""Schema of ``trained_linear``, with its gradient."""

from typing import Any

from torch import Tensor

from fpt_fast.ops.direct import call
from fpt_fast.ops.implementation import resolve
from fpt_fast.ops.schemas import define, with_gradient, without_gradient


def _trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    args = (x, weight, bias)
    out: Tensor = resolve("trained_linear", impl, args).load()(*args)
    return out.contiguous()


def _trained_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> Tensor:
    return weight.new_empty((*x.shape[: x.dim() - weight.dim() + 1], weight.shape[0]))


def _trained_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, impl: str
) -> tuple[Tensor, ...]:
    args = (grad, x, weight, need_x)
    grads = resolve("trained_linear_backward", impl, args).load()(*args)
    return tuple(part.contiguous() for part in grads)


def _trained_linear_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, impl: str
) -> tuple[Tensor, ...]:
    grad_x = x.new_empty(x.shape if need_x else (0,))
    return grad_x, weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _save_trained_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.impl = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight)


def _trained_linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]
    grad_x, *others = call("trained_linear_backward", grad, x, weight, need_x, ctx.impl)
    return grad_x if need_x else None, others[0], others[1] if ctx.has_bias else None, None


define(
    "trained_linear",
    "(Tensor x, Tensor weight, Tensor? bias, str impl) -> Tensor",
    _trained_linear,
    _trained_linear_fake,
)
define(
    "trained_linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool need_x, str impl)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _trained_linear_backward,
    _trained_linear_backward_fake,
)
with_gradient("trained_linear", _save_trained_linear, _trained_linear_gradient)
without_gradient("trained_linear_backward")
