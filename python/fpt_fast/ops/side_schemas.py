"""Schema of ``side_block``, with its gradient."""

from typing import Any

import torch
from torch import Tensor

from fpt_fast.ops.implementation import resolve
from fpt_fast.ops.schemas import define, library, lse_dtype, without_gradient

_ops = torch.ops.fpt

# Tokens, prompts and the weights in the order of SideWeights.
_TENSORS = (
    "Tensor tokens, Tensor prompts, Tensor norm1, Tensor norm1_bias, Tensor qkv, Tensor qkv_bias,"
    " Tensor proj, Tensor proj_bias, Tensor norm2, Tensor norm2_bias, Tensor fc1, Tensor fc1_bias,"
    " Tensor fc2, Tensor fc2_bias"
)
_SETTINGS = "int heads, int queries, float eps, bool narrow, str impl"
_COUNT = 14


def _side_block(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, prompts, *weights), (*settings, impl) = args[:_COUNT], args[_COUNT:]
    chosen = resolve("side_block", impl, (tokens, prompts, weights, settings[0]))
    out, attended, softmax = chosen.load()(tokens, prompts, weights, *settings)
    return out.contiguous(), attended, softmax


def _side_block_fake(tokens: Tensor, prompts: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    heads, queries = args[_COUNT - 2 : _COUNT]
    batch, _, width = tokens.shape
    wide = lse_dtype(tokens)
    return (
        tokens.new_empty((batch, queries, width)),
        tokens.new_empty((batch, queries, width), dtype=wide),
        tokens.new_empty((2, batch, heads, queries), dtype=wide),
    )


def _side_block_backward(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    (tokens, prompts, *weights), rest = args[:_COUNT], args[_COUNT:]
    attended, softmax, *settings, impl = rest
    chosen = resolve("side_block_backward", impl, (tokens, prompts, weights, settings[0]))
    gradients = chosen.load()(grad, tokens, prompts, weights, attended, softmax, *settings)
    return tuple(gradient.contiguous() for gradient in gradients)


def _side_block_backward_fake(grad: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[:_COUNT])


def _save_side_block(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    ctx.settings = inputs[_COUNT:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:_COUNT], *output[1:])


def _side_block_gradient(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    gradients = _ops.side_block_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (*gradients, *(None for _ in ctx.settings))


define(
    "side_block",
    f"({_TENSORS}, {_SETTINGS}) -> (Tensor out, Tensor attended, Tensor softmax)",
    _side_block,
    _side_block_fake,
)
define(
    "side_block_backward",
    f"(Tensor grad, {_TENSORS}, Tensor attended, Tensor softmax, {_SETTINGS}) -> "
    f"({', '.join(['Tensor'] * _COUNT)})",
    _side_block_backward,
    _side_block_backward_fake,
)
torch.library.register_autograd(
    "fpt::side_block", _side_block_gradient, setup_context=_save_side_block, lib=library
)
without_gradient("side_block_backward")
