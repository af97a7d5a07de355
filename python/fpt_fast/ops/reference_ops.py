"""Implementation ``reference``: the oracle behind the ops' signatures, in f32 or, for f64, f64."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fpt_fast.ops import reference
from fpt_fast.ops.reference import Scales


def token_scores(q: Tensor, k: Tensor, importance: str, lse: Tensor | None) -> Tensor:
    """``reference.token_scores``; ``lse`` would save work that the oracle wants done."""
    wide = _wide(q)
    return reference.token_scores(q.to(wide), k.to(wide), importance).float()


def frozen_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.frozen_attention``."""
    out, lse = reference.frozen_attention(*(tensor.to(_wide(q)) for tensor in (q, k, v)))
    return out.to(q.dtype), lse.float()


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """``reference.frozen_linear``."""
    wide = _wide(x)
    bias, residual, scale = (None if t is None else t.to(wide) for t in (bias, residual, scale))
    out = reference.frozen_linear(x.to(wide), weight.to(wide), bias, activation, residual, scale)
    return out.to(x.dtype)


def trained_linear(x: Tensor, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> Tensor:
    """``reference.trained_linear``, whose products are those of weight's dtype."""
    rows = None if added is None else added.to(weight.dtype)
    return reference.trained_linear(x.to(weight.dtype), weight, bias, rows)


def trained_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, added: Tensor | None, need_x: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``reference.trained_linear_backward``."""
    rows = None if added is None else added.to(weight.dtype)
    wide = (grad.to(weight.dtype), x.to(weight.dtype), weight, rows)
    grad_x, grad_weight, grad_bias = reference.trained_linear_backward(*wide)
    grad_added = weight.new_empty(0) if added is None else grad_x.sum_to_size(added.shape)
    return (
        grad_x.to(x.dtype) if need_x else x.new_empty(0),
        grad_weight,
        grad_bias,
        grad_added if added is None else grad_added.to(added.dtype),
    )


def select_tokens(
    scores: Tensor, k: Tensor, v: Tensor, keep: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``reference.select_tokens``, then one conversion."""
    kv, index = reference.select_tokens(scores, k, v, keep)
    return kv.to(dtype), index


def quantise_kv(kv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.quantise_kv`` in f32."""
    return reference.quantise_kv(kv.float(), dtype)


def side_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """``reference.side_attention``."""
    out, softmax = reference.side_attention(*(tensor.to(_wide(q)) for tensor in (q, k, v)))
    return out.to(q.dtype), softmax


def side_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``reference.side_attention_backward``, which computes ``out`` and ``softmax`` anew."""
    wide = (tensor.to(_wide(q)) for tensor in (grad, q, k, v))
    grad_q, grad_k, grad_v = (x.to(q.dtype) for x in reference.side_attention_backward(*wide))
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
    """``reference.side_layers``; nothing is kept for the gradient but the shapes of it."""
    wide = _wide(tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        out = reference.side_layers(
            tokens.to(wide), states.to(wide), [w.to(wide) for w in weights], heads, queries, eps
        )
    kept = []
    for left in reversed(range(len(states))):
        seen = tokens.shape[1] if left else queries
        kept += [out.new_zeros((len(tokens), seen, tokens.shape[2]))]
        kept += [out.new_zeros((2, len(tokens), heads, seen))]
        kept += [out.new_zeros(tokens.shape)] if left else []
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
    """``reference.side_layers_backward``."""
    wide = _wide(tokens)
    with torch.autocast(tokens.device.type, enabled=False):
        grad_tokens, grad_states, gradients = reference.side_layers_backward(
            grad.to(wide),
            tokens.to(wide),
            states.to(wide),
            [w.to(wide) for w in weights],
            heads,
            queries,
            eps,
        )
    return (
        grad_tokens.to(tokens.dtype),
        grad_states.to(states.dtype),
        [x.to(tokens.dtype) for x in gradients],
    )


def prompt_attention(
    q: Tensor, kv: Tensor, rows: Tensor | None, scales: Scales | None
) -> tuple[Tensor, Tensor]:
    """``reference.prompt_attention``."""
    out, lse = reference.prompt_attention(q.to(_wide(q)), kv, rows, scales)
    return out.to(q.dtype), lse


def prompt_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    scales: Scales | None,
) -> Tensor:
    """``reference.prompt_attention_backward``, which computes ``out`` and ``lse`` anew."""
    wide = _wide(q)
    return reference.prompt_attention_backward(grad.to(wide), q.to(wide), kv, rows, scales).to(
        q.dtype
    )


def prompt_attention_indexed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """``reference.prompt_attention_indexed``."""
    out, lse = reference.prompt_attention_indexed(q.to(_wide(q)), k, v, index)
    return out.to(q.dtype), lse


def prompt_attention_indexed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """``reference.prompt_attention_indexed_backward``, which computes ``out`` and ``lse`` anew."""
    wide = _wide(q)
    return reference.prompt_attention_indexed_backward(grad.to(wide), q.to(wide), k, v, index).to(
        q.dtype
    )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
