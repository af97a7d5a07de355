"""The oracle of every op: plain torch, in the dtype of its inputs, up to fp64.

Called with fp64 inputs, a function here is what an implementation is measured against;
called with the implementation's own inputs, it is the plain expression whose error sets
the budget.  Nothing is blocked, fused or reused: each function reads as its formula.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Scales = tuple[Tensor, Tensor]


def token_scores(q: Tensor, k: Tensor, importance: str = "global") -> Tensor:
    """Importance of every token to its head: q, k [B, H, N, D] -> [B, H, N] of q's dtype.

    ``"global"`` is the mean over all queries of the attention map, ``"class_token"`` the
    map's first row.
    """
    queries = q[:, :, :1] if importance == "class_token" else q
    weights = torch.softmax(queries @ k.transpose(-2, -1) * q.shape[-1] ** -0.5, dim=-1)
    return weights.mean(dim=-2)


def frozen_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A frozen layer's attention: q, k, v [B, H, N, D] -> out [B, H, N, D] and its row
    log-sum-exp [B, H, N], both of q's dtype."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return torch.softmax(logits, dim=-1) @ v, torch.logsumexp(logits, dim=-1)


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``residual + scale · act(x weightᵀ + bias)``: x [..., I], weight [O, I], bias, scale [O],
    residual [..., O] -> [..., O]; ``"gelu"`` is ``x Φ(x)``."""
    out = x @ weight.T if bias is None else x @ weight.T + bias
    if activation == "gelu":
        out = 0.5 * out * (1 + torch.erf(out * 2**-0.5))
    if scale is not None:
        out = out * scale
    return out if residual is None else residual + out


def trained_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    """``(x + added) weightᵀ + bias``: x [..., K], weight [O, K], bias [O] -> [..., O]; K may be
    several axes, and added has x's axes, or 1 in place of leading ones."""
    axes = weight.dim() - 1
    x = x if added is None else x + added
    last = list(range(-axes, 0)), list(range(1, axes + 1))
    out: Tensor = torch.tensordot(x, weight, last)
    return out if bias is None else out + bias


def trained_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, added: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias of ``trained_linear`` for ``grad`` [..., O]; the first one,
    summed to the sizes of added, is that to added."""
    leading = list(range(grad.dim() - 1))
    x = x if added is None else x + added
    grad_weight = torch.tensordot(grad, x, (leading, leading))
    return torch.tensordot(grad, weight, 1), grad_weight, grad.flatten(0, -2).sum(dim=0)


def select_tokens(scores: Tensor, k: Tensor, v: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the ``keep`` highest scores, in ascending token order.

    scores [B, H, N], k, v [B, H, N, D] -> kv [B, 2, H, K, D] of k's dtype, index [B, H, K] i32.
    Ties go to the lower index; NaN counts as minus infinity.
    """
    ranked = torch.where(scores.isnan(), -torch.inf, scores)
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[..., :keep]
    index = torch.sort(order, dim=-1).values  # [B, H, K]
    gather = index.unsqueeze(-1).expand(*index.shape, k.shape[-1])
    kv = torch.stack([k.gather(2, gather), v.gather(2, gather)], dim=1)
    return kv, index.to(torch.int32)


def quantise_kv(kv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Kept keys and values [M, L, 2, H, K, D] in 8 bits: of K by channel, of V by token.

    -> kv8 of ``dtype``, k_scales [M, L, H, D], v_scales [M, L, H, K], both of kv's dtype.  What is
    all zero, or too small for a normal scale, becomes 0 of scale 0; what holds NaN or infinity
    becomes 0 of scale NaN.
    """
    keys, values = kv.unbind(dim=2)  # [M, L, H, K, D]
    keys8, k_scales = _quantise(keys, dtype, axis=-2)
    values8, v_scales = _quantise(values, dtype, axis=-1)
    return torch.stack([keys8, values8], dim=2), k_scales.squeeze(-2), v_scales.squeeze(-1)


def side_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The side network's attention: q [B, H, Q, D], k, v [B, H, T, D] -> out [B, H, Q, D], and
    [2, B, H, Q]: each row's highest logit, and 1 over its sum of exponentials above that."""
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    tops = logits.amax(dim=-1)
    shares = 1 / (logits - tops.unsqueeze(-1)).exp().sum(dim=-1)
    return torch.softmax(logits, dim=-1) @ v, torch.stack([tops, shares])


def side_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q, k and v of ``side_attention`` for ``grad`` [B, H, Q, D]."""
    scale = q.shape[-1] ** -0.5
    weights = torch.softmax(q @ k.transpose(-2, -1) * scale, dim=-1)
    slopes = grad @ v.transpose(-2, -1)
    slopes = weights * (slopes - (weights * slopes).sum(dim=-1, keepdim=True))
    grad_k = slopes.transpose(-2, -1) @ q * scale
    return slopes @ k * scale, grad_k, weights.transpose(-2, -1) @ grad


def side_layers(
    tokens: Tensor,
    states: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    queries: int,
    eps: float,
) -> Tensor:
    """Layers of the side network: tokens [B, T, S], prompts of each layer ``states`` [L, B, P, S],
    weights of each in the order of ``SideWeights`` -> the first ``queries`` tokens after the last.
    """
    *_, last = _outputs(tokens, states, weights, heads, eps)
    return last[:, :queries]


def side_layers_backward(
    grad: Tensor,
    tokens: Tensor,
    states: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    queries: int,
    eps: float,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients to tokens, states and every weight of ``side_layers`` for ``grad``, as ``out``."""
    inputs = [tokens, *_outputs(tokens, states, weights, heads, eps)]
    grad_states, gradients = torch.empty_like(states), list[Tensor]()
    for layer in reversed(range(len(states))):
        own = _of_layer(weights, layer, states)
        grad, grad_states[layer], *others = _side_layer_backward(
            grad, inputs[layer], states[layer], own, heads, queries, eps
        )
        gradients[:0], queries = others, tokens.shape[1]
    return grad, grad_states, gradients


def _outputs(
    tokens: Tensor, states: Tensor, weights: Sequence[Tensor], heads: int, eps: float
) -> Iterator[Tensor]:
    """All tokens after each layer."""
    for layer, prompts in enumerate(states):
        own = _of_layer(weights, layer, states)
        tokens = _side_layer(tokens, prompts, own, heads, tokens.shape[1], eps)
        yield tokens


def _of_layer(weights: Sequence[Tensor], layer: int, states: Tensor) -> Sequence[Tensor]:
    size = len(weights) // len(states)
    return weights[size * layer : size * (layer + 1)]


def _side_layer(
    tokens: Tensor,
    prompts: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    queries: int,
    eps: float,
) -> Tensor:
    """The first ``queries`` tokens [B, queries, S] after one layer.

    The prompts go through every step and are cut off at the end.
    """
    norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias = weights[:6]
    norm2, norm2_bias, fc1, fc1_bias, fc2, fc2_bias = weights[6:]
    x = torch.cat([tokens, prompts], dim=1)
    q, k, v = _split(_standard(x, eps)[0] * norm1 + norm1_bias, qkv, qkv_bias, heads)
    x = x + _merge(side_attention(q, k, v)[0]) @ proj.T + proj_bias
    inner = (_standard(x, eps)[0] * norm2 + norm2_bias) @ fc1.T + fc1_bias
    x = x + inner * _normal_cdf(inner) @ fc2.T + fc2_bias
    return x[:, :queries]


def _side_layer_backward(
    grad: Tensor,
    tokens: Tensor,
    prompts: Tensor,
    weights: Sequence[Tensor],
    heads: int,
    queries: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients to tokens, prompts and every weight of ``_side_layer``, for ``grad``."""
    norm1, norm1_bias, qkv, qkv_bias, proj, proj_bias = weights[:6]
    norm2, norm2_bias, fc1, fc1_bias, fc2, _ = weights[6:]
    x = torch.cat([tokens, prompts], dim=1)
    standard1, inverse1 = _standard(x, eps)
    normed1 = standard1 * norm1 + norm1_bias
    q, k, v = _split(normed1, qkv, qkv_bias, heads)
    attended = _merge(side_attention(q, k, v)[0])
    standard2, inverse2 = _standard(x + attended @ proj.T + proj_bias, eps)
    normed2 = standard2 * norm2 + norm2_bias
    inner = normed2 @ fc1.T + fc1_bias
    slope = _normal_cdf(inner) + inner * (-inner.square() / 2).exp() / (2 * torch.pi) ** 0.5

    grad = torch.cat([grad, grad.new_zeros(len(x), x.shape[1] - queries, x.shape[2])], dim=1)
    grad_inner = grad @ fc2 * slope
    through_mlp = _standard_backward(grad_inner @ fc1 * norm2, standard2, inverse2)
    grad_middle = grad + through_mlp
    split = side_attention_backward(_split_heads(grad_middle @ proj, heads), q, k, v)
    grad_qkv = torch.cat([_merge(part) for part in split], dim=-1)
    grad_x = grad_middle + _standard_backward(grad_qkv @ qkv * norm1, standard1, inverse1)
    return (
        grad_x[:, : tokens.shape[1]],
        grad_x[:, tokens.shape[1] :],
        *_norm_gradients(grad_qkv @ qkv, standard1),
        *_linear_gradients(grad_qkv, normed1),
        *_linear_gradients(grad_middle, attended),
        *_norm_gradients(grad_inner @ fc1, standard2),
        *_linear_gradients(grad_inner, normed2),
        *_linear_gradients(grad, inner * _normal_cdf(inner)),
    )


def _standard(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x of mean 0 and variance 1 along the last axis, and 1 over its deviation."""
    centred = x - x.mean(dim=-1, keepdim=True)
    inverse = (centred.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return centred * inverse, inverse


def _standard_backward(grad: Tensor, standard: Tensor, inverse: Tensor) -> Tensor:
    along = (grad * standard).mean(dim=-1, keepdim=True)
    return (grad - grad.mean(dim=-1, keepdim=True) - standard * along) * inverse


def _norm_gradients(grad: Tensor, standard: Tensor) -> tuple[Tensor, Tensor]:
    return (grad * standard).sum(dim=(0, 1)), grad.sum(dim=(0, 1))


def _linear_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return grad.flatten(0, 1).T @ x.flatten(0, 1), grad.sum(dim=(0, 1))


def _normal_cdf(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / 2**0.5)) / 2


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, S] -> [B, H, N, D]"""
    return x.view(*x.shape[:2], heads, -1).transpose(1, 2)


def _split(x: Tensor, qkv: Tensor, bias: Tensor, heads: int) -> list[Tensor]:
    """q, k, v [B, H, N, D] of x [B, N, S]"""
    return [_split_heads(part, heads) for part in (x @ qkv.T + bias).chunk(3, dim=-1)]


def _merge(x: Tensor) -> Tensor:
    """[B, H, N, D] -> [B, N, S]"""
    return x.transpose(1, 2).flatten(2)


def prompt_attention(
    q: Tensor, kv: Tensor, rows: Tensor | None = None, scales: Scales | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of prompts to the kept tokens of every image.

    q [L, H, P, D], kv [M, L, 2, H, K, D], rows [B] i64, scales ([M, L, H, D], [M, L, H, K])
    -> out [L, B, P, C] and its row log-sum-exp [L, B, H, P], both of q's dtype.
    """
    keys, values = _keys_and_values(q, kv, rows, scales)
    logits = q @ keys.transpose(-2, -1) * q.shape[-1] ** -0.5  # [B, L, H, P, K]
    out = torch.softmax(logits, dim=-1) @ values  # [B, L, H, P, D]
    lse = torch.logsumexp(logits, dim=-1).transpose(0, 1).contiguous()
    return out.permute(1, 0, 3, 2, 4).flatten(-2), lse


def prompt_attention_backward(
    grad: Tensor, q: Tensor, kv: Tensor, rows: Tensor | None = None, scales: Scales | None = None
) -> Tensor:
    """Gradient to q [L, H, P, D] of ``prompt_attention`` for ``grad`` [L, B, P, C]."""
    keys, values = _keys_and_values(q, kv, rows, scales)
    layers, heads, prompts, width = q.shape
    scale = width**-0.5
    weights = torch.softmax(q @ keys.transpose(-2, -1) * scale, dim=-1)  # [B, L, H, P, K]
    split = grad.reshape(layers, -1, prompts, heads, width)
    grad_out = split.permute(1, 0, 3, 2, 4)  # [B, L, H, P, D]
    grad_weights = grad_out @ values.transpose(-2, -1)
    mean = (weights * grad_weights).sum(dim=-1, keepdim=True)
    grad_logits = weights * (grad_weights - mean)
    grad_q: Tensor = (grad_logits @ keys).sum(dim=0) * scale
    return grad_q


def prompt_attention_indexed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """``prompt_attention`` to tokens ``index`` [B, L, H, K] of k, v [L, B, H, N, D]."""
    return prompt_attention(q, _gather_tokens(k, v, index))


def prompt_attention_indexed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor
) -> Tensor:
    """Gradient to q [L, H, P, D] of ``prompt_attention_indexed`` for ``grad`` [L, B, P, C]."""
    return prompt_attention_backward(grad, q, _gather_tokens(k, v, index))


def _keys_and_values(
    q: Tensor, kv: Tensor, rows: Tensor | None, scales: Scales | None
) -> tuple[Tensor, Tensor]:
    """Dequantised keys and values [B, L, H, K, D] each, of q's dtype."""
    picked = kv if rows is None else kv[rows]
    keys, values = picked.to(q.dtype).unbind(dim=2)
    if scales is None:
        return keys, values
    k_scales, v_scales = (s.to(q.dtype) if rows is None else s[rows].to(q.dtype) for s in scales)
    return keys * k_scales.unsqueeze(-2), values * v_scales.unsqueeze(-1)


def _quantise(x: Tensor, dtype: torch.dtype, axis: int) -> tuple[Tensor, Tensor]:
    """``x`` in 8 bits, and the scales along ``axis`` that give it back: x8 * scales."""
    # A tensor: torch divides a number by a tensor by way of its reciprocal.
    largest = x.new_tensor(127.0 if dtype == torch.int8 else torch.finfo(dtype).max)
    top = x.abs().amax(dim=axis, keepdim=True)  # NaN where there is any
    scales = top / largest
    is_plain = (scales >= torch.finfo(x.dtype).tiny) & top.isfinite()
    scaled = torch.where(is_plain, x * (largest / top), 0)
    rounded = scaled.round() if dtype == torch.int8 else scaled  # conversion rounds fp8 itself
    scales = torch.where(is_plain, scales, 0).masked_fill(~top.isfinite(), torch.nan)
    return rounded.to(dtype), scales


def _gather_tokens(k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """Kept tokens of k, v [L, B, H, N, D] as kv [B, L, 2, H, K, D]."""
    gather = index.transpose(0, 1).long().unsqueeze(-1).expand(-1, -1, -1, -1, k.shape[-1])
    kv = torch.stack([k.gather(3, gather), v.gather(3, gather)], dim=2)  # [L, B, 2, H, K, D]
    return kv.transpose(0, 1)
