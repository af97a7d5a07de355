"""Implementation ``cpu`` of the ops: plain torch in blocks that fit the caches."""

import torch
from torch import Tensor

from fpt_fast.ops import blocks, fused, prompt_blocks
from fpt_fast.ops.prompt_blocks import IndexedTokens, StoredTokens
from fpt_fast.ops.quantise_blocks import quantise_block
from fpt_fast.ops.reference import Scales


def attention_with_scores(
    q: Tensor, k: Tensor, v: Tensor, need_output: bool, need_scores: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Output, scores and row log-sum-exp, by whichever way is faster for q's dtype."""
    if fused.is_faster(q):
        out, lse = fused.attend(q, k, v)
        scores = fused.scores_from_lse(q, k, lse) if need_scores else None
        return out if need_output else None, scores, lse
    return blocks.attend_in_blocks(q, k, v if need_output else None, need_scores=need_scores)


def frozen_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and row log-sum-exp."""
    out, _, lse = attention_with_scores(q, k, v, need_output=True, need_scores=False)
    assert out is not None
    return out, lse


def token_scores(q: Tensor, k: Tensor, importance: str, lse: Tensor | None) -> Tensor:
    """Scores [B, H, N] f32; a first pass only where lse is not given."""
    if importance == "class_token":
        return blocks.mean_weights(q[:, :, :1], k)
    if fused.is_faster(q):
        return fused.scores_from_lse(q, k, fused.attend(q, k, k)[1] if lse is None else lse)
    if lse is None:
        return blocks.mean_weights(q, k)
    return blocks.scores_from_lse(q, k, lse)


def select_tokens(
    scores: Tensor, k: Tensor, v: Tensor, keep: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Stable sort (torch.topk does not keep ties in order), then one indexed copy each."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :keep]
    index = torch.sort(order, dim=-1).values  # [B, H, K]
    batch, heads, _, width = k.shape
    kv = k.new_empty((batch, 2, heads, keep, width), dtype=dtype)
    image = torch.arange(batch).view(-1, 1, 1)
    head = torch.arange(heads).view(-1, 1)
    kv[:, 0] = k[image, head, index]
    kv[:, 1] = v[image, head, index]
    return kv, index.to(torch.int32)


def quantise_kv(kv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of one image at a time, converted, used and overwritten: no f32 copy of kv."""
    images, layers, _, heads, kept, width = kv.shape
    kv8 = kv.new_empty(kv.shape, dtype=dtype)
    k_scales = kv.new_empty((images, layers, heads, width), dtype=torch.float32)
    v_scales = kv.new_empty((images, layers, heads, kept), dtype=torch.float32)
    wide = kv.new_empty((2, heads, kept, width), dtype=torch.float32)
    for image in range(images):
        for layer in range(layers):
            wide.copy_(kv[image, layer])
            quantise_block(wide[0], k_scales[image, layer], dtype, axis=1)
            quantise_block(wide[1], v_scales[image, layer], dtype, axis=2)
            kv8[image, layer] = wide
    return kv8, k_scales, v_scales


def prompt_attention(
    q: Tensor, kv: Tensor, rows: Tensor | None, scales: Scales | None
) -> tuple[Tensor, Tensor]:
    """Output [L, B, P, C] and log-sum-exp [L, B, H, P]."""
    return prompt_blocks.forward(q, StoredTokens(kv, rows, scales))


def prompt_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    scales: Scales | None,
) -> Tensor:
    """Gradient to q [L, H, P, D]."""
    return prompt_blocks.backward(grad, q, lse, StoredTokens(kv, rows, scales))


def prompt_attention_indexed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [L, B, P, C] and log-sum-exp [L, B, H, P]."""
    return prompt_blocks.forward(q, IndexedTokens(k, v, index))


def prompt_attention_indexed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """Gradient to q [L, H, P, D]."""
    return prompt_blocks.backward(grad, q, lse, IndexedTokens(k, v, index))
