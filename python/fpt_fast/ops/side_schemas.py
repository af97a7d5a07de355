"""Schema of ``side_layers``, with its gradient.

``weights`` are those of all layers, in the order of ``SideWeights``.  ``kept`` is what the gradient
needs: of each layer the attention's output [B, Q, S] and its softmax's rows [2, B, H, Q], and its
own output unless it is the last.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpt_fast.ops.implementation import resolve
from fpt_fast.ops.schemas import define, library, lse_dtype, without_gradient

_ops = torch.ops.fpt

_TENSORS = "Tensor tokens, Tensor states, Tensor[] weights"
_SETTINGS = "int heads, int queries, float eps, bool narrow, str impl"


def _side_layers(
    tokens: Tensor, states: Tensor, weights: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, list[Tensor]]:
    *settings, impl = rest
    chosen = resolve("side_layers", impl, (tokens, states, weights, settings[0]))
    out, kept = chosen.load()(tokens, states, weights, *settings)
    return out.contiguous(), kept


def _side_layers_fake(
    tokens: Tensor, states: Tensor, weights: Sequence[Tensor], heads: int, queries: int, *_: Any
) -> tuple[Tensor, list[Tensor]]:
    batch, count, width = tokens.shape
    wide = lse_dtype(tokens)
    kept = []
    for left in reversed(range(len(states))):
        seen = count if left else queries
        kept.append(tokens.new_empty((batch, seen, width), dtype=wide))
        kept.append(tokens.new_empty((2, batch, heads, seen), dtype=wide))
        if left:
            kept.append(tokens.new_empty(tokens.shape, dtype=wide))
    return tokens.new_empty((batch, queries, width)), kept


def _side_layers_backward(
    grad: Tensor,
    tokens: Tensor,
    states: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    *rest: Any,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *settings, impl = rest
    chosen = resolve("side_layers_backward", impl, (tokens, states, weights, settings[0]))
    grad_tokens, grad_states, gradients = chosen.load()(
        grad, tokens, states, weights, kept, *settings
    )
    return grad_tokens.contiguous(), grad_states, [gradient.contiguous() for gradient in gradients]


def _side_layers_backward_fake(
    grad: Tensor, tokens: Tensor, states: Tensor, weights: Sequence[Tensor], *_: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    tokens, states, *rest = (x.new_empty(x.shape) for x in (tokens, states, *weights))
    return tokens, states, rest


def _save_side_layers(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]
) -> None:
    (tokens, states, weights, *settings), (_, kept) = inputs, output
    ctx.settings, ctx.weights = settings, len(weights)
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)  # or zeros are made for all of them
    ctx.save_for_backward(tokens, states, *weights, *kept)


def _side_layers_gradient(ctx: Any, grad: Tensor | None, _: list[Tensor | None]) -> tuple[Any, ...]:
    if grad is None:
        return (None, None, [None] * ctx.weights, *(None for _ in ctx.settings))
    tokens, states, *rest = ctx.saved_tensors
    weights, kept = rest[: ctx.weights], rest[ctx.weights :]
    gradients = _ops.side_layers_backward(grad, tokens, states, weights, kept, *ctx.settings)
    return (*gradients, *(None for _ in ctx.settings))


define(
    "side_layers",
    f"({_TENSORS}, {_SETTINGS}) -> (Tensor out, Tensor[] kept)",
    _side_layers,
    _side_layers_fake,
)
define(
    "side_layers_backward",
    f"(Tensor grad, {_TENSORS}, Tensor[] kept, {_SETTINGS}) -> (Tensor, Tensor, Tensor[])",
    _side_layers_backward,
    _side_layers_backward_fake,
)
torch.library.register_autograd(
    "fpt::side_layers", _side_layers_gradient, setup_context=_save_side_layers, lib=library
)
without_gradient("side_layers_backward")
