"""Schemas of the ops that a training step needs, with their gradients."""

from typing import Any

from torch import Tensor

from fpt_fast.ops.checks import check_values_in_range
from fpt_fast.ops.direct import call
from fpt_fast.ops.implementation import resolve
from fpt_fast.ops.reference import Scales
from fpt_fast.ops.schemas import define, lse_dtype, with_gradient, without_gradient


def _pair(k_scales: Tensor | None, v_scales: Tensor | None) -> Scales | None:
    return None if k_scales is None or v_scales is None else (k_scales, v_scales)


def _prompt_attention(
    q: Tensor,
    kv: Tensor,
    rows: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if rows is not None:
        check_values_in_range("rows", rows, kv.shape[0], "images of kv")
    scales = _pair(k_scales, v_scales)
    function = resolve("prompt_attention", impl, (q, kv, rows, scales)).load()
    out, lse = function(q, kv, rows, scales)
    return out, lse


def _prompt_attention_fake(
    q: Tensor,
    kv: Tensor,
    rows: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    layers, heads, prompts, width = q.shape
    images = kv.shape[0] if rows is None else rows.shape[0]
    lse = q.new_empty((layers, images, heads, prompts), dtype=lse_dtype(q))
    return q.new_empty((layers, images, prompts, heads * width)), lse


def _prompt_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    impl: str,
) -> Tensor:
    scales = _pair(k_scales, v_scales)
    args = (grad, q, kv, out, lse, rows, scales)
    grad_q: Tensor = resolve("prompt_attention_backward", impl, args).load()(*args)
    return grad_q


def _prompt_attention_backward_fake(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    impl: str,
) -> Tensor:
    return q.new_empty(q.shape)


def _save_prompt_attention(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, kv, rows, k_scales, v_scales, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, kv, *output, rows, k_scales, v_scales)


def _prompt_attention_gradient(
    ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    grad_q = call("prompt_attention_backward", grad, *ctx.saved_tensors, ctx.impl)
    return grad_q, None, None, None, None, None


define(
    "prompt_attention",
    "(Tensor q, Tensor kv, Tensor? rows, Tensor? k_scales, Tensor? v_scales, str impl)"
    " -> (Tensor out, Tensor lse)",
    _prompt_attention,
    _prompt_attention_fake,
)
define(
    "prompt_attention_backward",
    "(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor? rows,"
    " Tensor? k_scales, Tensor? v_scales, str impl) -> Tensor",
    _prompt_attention_backward,
    _prompt_attention_backward_fake,
)
with_gradient("prompt_attention", _save_prompt_attention, _prompt_attention_gradient)
without_gradient("prompt_attention_backward")


def _prompt_attention_indexed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    check_values_in_range("index", index, k.shape[3], "tokens of k")
    function = resolve("prompt_attention_indexed", impl, (q, k, v, index)).load()
    out, lse = function(q, k, v, index)
    return out, lse


def _prompt_attention_indexed_fake(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    layers, heads, prompts, width = q.shape
    images = index.shape[0]
    lse = q.new_empty((layers, images, heads, prompts), dtype=lse_dtype(q))
    return q.new_empty((layers, images, prompts, heads * width)), lse


def _prompt_attention_indexed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    impl: str,
) -> Tensor:
    args = (grad, q, k, v, index, out, lse)
    grad_q: Tensor = resolve("prompt_attention_indexed_backward", impl, args).load()(*args)
    return grad_q


def _prompt_attention_indexed_backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    impl: str,
) -> Tensor:
    return q.new_empty(q.shape)


def _save_prompt_attention_indexed(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, index, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, index, *output)


def _prompt_attention_indexed_gradient(
    ctx: Any, grad: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 5
    grad_q = call("prompt_attention_indexed_backward", grad, *ctx.saved_tensors, ctx.impl)
    return grad_q, None, None, None, None


define(
    "prompt_attention_indexed",
    "(Tensor q, Tensor k, Tensor v, Tensor index, str impl) -> (Tensor out, Tensor lse)",
    _prompt_attention_indexed,
    _prompt_attention_indexed_fake,
)
define(
    "prompt_attention_indexed_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor index, Tensor out, Tensor lse, str impl)"
    " -> Tensor",
    _prompt_attention_indexed_backward,
    _prompt_attention_indexed_backward_fake,
)
with_gradient(
    "prompt_attention_indexed", _save_prompt_attention_indexed, _prompt_attention_indexed_gradient
)
without_gradient("prompt_attention_indexed_backward")


def _heads_inside(x: Tensor) -> Tensor:
    """[B, H, N, D] in memory [B, N, H, D], whoever computed it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _side_attention(q: Tensor, k: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    out, softmax = resolve("side_attention", impl, (q, k, v)).load()(q, k, v)
    return _heads_inside(out), softmax


def _side_attention_fake(q: Tensor, k: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    softmax = q.new_empty((2, *q.shape[:3]), dtype=lse_dtype(q))
    return _heads_inside(q.new_empty(q.shape)), softmax


def _side_attention_backward(*args: Any) -> tuple[Tensor, ...]:
    *tensors, impl = args
    function = resolve("side_attention_backward", impl, tensors[1:4]).load()
    return tuple(_heads_inside(x) for x in function(*tensors))


def _side_attention_backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(_heads_inside(x.new_empty(x.shape)) for x in args[:3])


def _save_side_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *qkv, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*qkv, *output)


def _side_attention_gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if grad is None:
        return (None,) * 4
    return (*call("side_attention_backward", grad, *ctx.saved_tensors, ctx.impl), None)


define(
    "side_attention",
    "(Tensor q, Tensor k, Tensor v, str impl) -> (Tensor out, Tensor softmax)",
    _side_attention,
    _side_attention_fake,
)
define(
    "side_attention_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax, str impl)"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
    _side_attention_backward,
    _side_attention_backward_fake,
)
with_gradient("side_attention", _save_side_attention, _side_attention_gradient)
without_gradient("side_attention_backward")
