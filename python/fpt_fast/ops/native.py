"""Implementation ``native`` of the ops: the C++ extension, whose sources are in ``csrc/``."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fpt_fast.ops.reference import Scales

_ops = torch.ops.fpt_native


def level() -> str:
    """Level of kernels that the environment asks for; empty for the best one."""
    return os.environ.get("FPT_NATIVE_LEVEL", "")


def select_tokens(
    scores: Tensor, k: Tensor, v: Tensor, keep: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Radix selection, then one pass of copies that convert as they go."""
    kv, index = _ops.select_tokens(scores, k, v, keep, dtype, level())
    return kv, index


def token_scores(q: Tensor, k: Tensor, importance: str, lse: Tensor | None) -> Tensor:
    """Blocks of logits that stay in the caches; a first pass only where lse is not given."""
    scores: Tensor = _ops.token_scores(q, k, importance == "class_token", lse, level())
    return scores


def frozen_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] of memory [B, N, H, D], and lse [B, H, N] f32."""
    out, _, lse = _ops.frozen_attention(q, k, v, True, False, level())
    return out.transpose(1, 2), lse


def attention_with_scores(
    q: Tensor, k: Tensor, v: Tensor, need_output: bool, need_scores: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The same with scores [B, H, N] f32, as far as is asked for, from one product."""
    out, scores, lse = _ops.frozen_attention(q, k, v, need_output, need_scores, level())
    return out.transpose(1, 2) if need_output else None, scores if need_scores else None, lse


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """[..., O] of bf16: one pass over the rows, whose sums stay f32 until all is done to them."""
    shape = (*x.shape[:-1], weight.shape[0])
    rows = x.reshape(-1, x.shape[-1])
    added = None if residual is None else residual.reshape(-1, weight.shape[0])
    gelu = activation == "gelu"
    out: Tensor = _ops.frozen_linear(rows, weight, bias, gelu, added, scale, level())
    return out.view(shape)


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
    """[..., O] f32: rows are read where they are, the weights packed once a call."""
    out: Tensor = _ops.trained_linear(x, weight, bias, added, level())
    return out


def trained_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, added: Tensor | None, need_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, of its dtype, to weight and bias, and to added, of its dtype."""
    grads = _ops.trained_linear_backward(grad.contiguous(), x, weight, added, need_x, level())
    grad_x, grad_weight, grad_bias, grad_added = grads
    return grad_x, grad_weight, grad_bias, grad_added


def side_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D], in memory [B, Q, H, D], and the softmax's rows [2, B, H, Q].

    Half-precision tensors are computed in f32, which is what the kernels know.
    """
    out, softmax = _ops.side_attention(q.float(), k.float(), v.float(), level())
    return out.transpose(1, 2).to(q.dtype), softmax


def side_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v; no attention map exists as a whole."""
    wide = (x.float() for x in (grad, q, k, v, out))
    grads = _ops.side_attention_backward(*wide, softmax.contiguous(), level())
    grad_q, grad_k, grad_v = (x.transpose(1, 2).to(q.dtype) for x in grads)
    return grad_q, grad_k, grad_v


def side_layers(
    tokens: Tensor,
    states: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    queries: int,
    eps: float,
    narrow: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Output [B, Q, S], and what ``side_layers_backward`` takes; f32 between the layers."""
    out, kept = _ops.side_layers(
        _plain(tokens), _plain(states), _all_plain(weights), heads, queries, eps, narrow, level()
    )
    return out.to(tokens.dtype), kept


def side_layers_backward(
    grad: Tensor,
    tokens: Tensor,
    states: Tensor,
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    heads: int,
    queries: int,
    eps: float,
    narrow: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients to tokens, states and weights; all but the attention is computed anew."""
    layers = (_plain(tokens), _plain(states), _all_plain(weights), kept)
    grad_tokens, grad_states, gradients = _ops.side_layers_backward(
        _plain(grad), *layers, heads, queries, eps, narrow, level()
    )
    dtype = tokens.dtype
    if dtype != torch.float32:
        gradients = [gradient.to(dtype) for gradient in gradients]
    return grad_tokens.to(dtype), grad_states.to(states.dtype), gradients


def _all_plain(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of one dtype, as a rule f32 and contiguous: 72 of them, in every step."""
    if weights[0].dtype == torch.float32 and all(weight.is_contiguous() for weight in weights):
        return weights
    return [_plain(weight) for weight in weights]


def _plain(x: Tensor) -> Tensor:
    return x.float().contiguous()


def prompt_attention(
    q: Tensor, kv: Tensor, rows: Tensor | None, scales: Scales | None
) -> tuple[Tensor, Tensor]:
    """Output [L, B, P, C] and log-sum-exp [L, B, H, P], straight over the stored features."""
    out, lse = _ops.prompt_attention(q, kv, rows, *(scales or (None, None)), level())
    return out, lse


def prompt_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    scales: Scales | None,
) -> Tensor:
    """Gradient to q [L, H, P, D]; the weights are computed anew, ``out`` is not needed."""
    grad_q: Tensor = _ops.prompt_attention_backward(
        grad, q, kv, lse.contiguous(), rows, *(scales or (None, None)), level()
    )
    return grad_q


def prompt_attention_indexed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [L, B, P, C] and log-sum-exp [L, B, H, P], gathering row by row."""
    out, lse = _ops.prompt_attention_indexed(q, k, v, index, level())
    return out, lse


def prompt_attention_indexed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """Gradient to q [L, H, P, D]; the weights are computed anew, ``out`` is not needed."""
    grad_q: Tensor = _ops.prompt_attention_indexed_backward(
        grad, q, k, v, index, lse.contiguous(), level()
    )
    return grad_q
