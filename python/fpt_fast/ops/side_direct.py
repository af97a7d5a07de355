"""``native`` of ``side_layers`` as a function of autograd, for plain tensors and eager code.

The op says the same to all of torch, and pays for that: its gradient's tensors, 72 weights of six
layers among them, go through lists, trees and the dispatcher, twice each way.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpt_fast.ops.implementation import resolve

_NATIVE = "native"
Settings = tuple[int, int, float, bool]  # heads, queries, eps, narrow


def side_layers_directly(
    tokens: Tensor, states: Tensor, weights: Sequence[Tensor], settings: Settings
) -> Tensor:
    """Output [B, queries, S] of the op with the same gradients, once."""
    out: Tensor = _SideLayers.apply(settings, tokens, states, *weights)
    return out


class _SideLayers(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, settings: Settings, tokens: Tensor, states: Tensor, *weights: Tensor
    ) -> Tensor:
        chosen = resolve("side_layers", _NATIVE, (tokens, states, weights, settings[0]))
        out, kept = chosen.load()(tokens, states, weights, *settings)
        ctx.settings, ctx.count = settings, len(weights)
        ctx.save_for_backward(tokens, states, *weights, *kept)
        last: Tensor = out
        return last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, states, *rest = ctx.saved_tensors
        weights, kept = rest[: ctx.count], rest[ctx.count :]
        args = (tokens, states, weights, ctx.settings[0])
        backward = resolve("side_layers_backward", _NATIVE, args).load()
        grad_tokens, grad_states, gradients = backward(
            grad, tokens, states, weights, kept, *ctx.settings
        )
        return (None, grad_tokens, grad_states, *gradients)
