"""Attention and token scores from torch's fused CPU attention: two calls, no map, no scratch.

The fused kernel returns the row log-sum-exp with the output.  Column means come from the
same kernel with queries and keys in each other's place: with ``lse`` taken off every logit,
the log-sum-exp over the queries of key ``j`` is

    log sum_i exp(q_i k_j / sqrt(D) - lse_i) = log(N * scores_j).

Taking ``lse`` off costs no mask: it rides in three extra features of the queries (a float of
24 bits is the sum of three of 8), against features of -1 in the keys.  Logits, exponentials
and sums stay in f32 inside the kernel, so that scores of bf16 inputs carry no rounding of logits.
"""

from functools import cache

import torch
from torch import Tensor

# Three for lse, and zeros up to a width that packs as well as the plain one.
_EXTRA_FEATURES = 8


@cache
def has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def is_faster(q: Tensor) -> bool:
    """Whether the fused kernel beats blocks here: bf16 in hardware (f32 and f16 it does slower)."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and has_fast_bf16()


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, H, N, D] of q's dtype and row log-sum-exp [B, H, N] f32 of q, k, v."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
    return out, lse.contiguous()  # the kernel lays it out [B, N, H]


def scores_from_lse(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """Mean over the queries of the attention map [B, H, N] f32, given its row log-sum-exp."""
    width, tokens = q.shape[-1], q.shape[2]
    scale = width**-0.5
    shape = (*q.shape[:3], width + _EXTRA_FEATURES)
    queries, keys = q.new_zeros(shape), k.new_zeros(shape)
    queries[..., :width] = q
    keys[..., :width] = k
    keys[..., width : width + 3] = -1
    rest = lse / scale
    for feature in range(width, width + 3):
        part = rest.to(q.dtype)
        queries[..., feature] = part
        rest = rest - part
    # The kernel wants values; the queries are at hand, and the output is dropped.
    _, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        keys, queries, queries, scale=scale
    )
    scores: Tensor = log_sums.contiguous().exp_().div_(tokens)
    return scores
