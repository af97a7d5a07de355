"""Implementation ``cpu`` of the ops: plain torch in blocks that fit the caches."""

import torch
from torch import Tensor

from fpt_fast.ops import prompt_blocks
from fpt_fast.ops.blocks import attend_in_blocks, scores_from_lse
from fpt_fast.ops.prompt_blocks import IndexedTokens, StoredTokens
from fpt_fast.ops.reference import Scales


def token_scores(q: Tensor, k: Tensor, importance: str, lse: Tensor | None) -> Tensor:
    """Scores [B, H, N] f32 in blocks of queries; in one pass of blocks of keys given lse."""
    if importance == "class_token":
        q = q[:, :, :1]
    elif lse is not None:
        return scores_from_lse(q, k, lse)
    _, scores, _ = attend_in_blocks(q, k, None, need_scores=True)
    assert scores is not None
    return scores


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
    return prompt_blocks.backward(grad, q, out, lse, StoredTokens(kv, rows, scales))


def prompt_attention_indexed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """Output [L, B, P, C] and log-sum-exp [L, B, H, P]."""
    return prompt_blocks.forward(q, IndexedTokens(k, v, index))


def prompt_attention_indexed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """Gradient to q [L, H, P, D]."""
    return prompt_blocks.backward(grad, q, out, lse, IndexedTokens(k, v, index))
