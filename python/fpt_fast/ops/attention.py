"""``attention_with_scores``: a layer's attention and its token scores from one pass."""

import torch.nn.functional as F
from torch import Tensor

from fpt_fast.ops import cpu
from fpt_fast.ops.checks import (
    FLOAT_DTYPES,
    check_axes,
    check_dtype,
    check_no_grad,
    check_same_device,
    check_shape,
)
from fpt_fast.ops.token_scores import token_scores


def attention_with_scores(
    q: Tensor, k: Tensor, v: Tensor, *, need_output: bool = True, need_scores: bool = True
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Attention ``softmax(q kᵀ / √D) v`` of a frozen layer together with its global token scores.

    On a CPU either one product ``q kᵀ`` and one pass of exponentials serve both, in blocks, or
    torch's fused attention runs twice (bf16 in hardware), whichever is faster; on other
    devices the attention is torch's own and the scores are ``token_scores``.  No path stores a
    map of N x N: beyond copies of its inputs and outputs, the scratch of the CPU path is at
    most 16 MB (f64: 32 MB), whatever N.

    Args:
        q: queries [B, H, N, D], f16, bf16, f32 or f64, any strides.
        k: keys [B, H, N, D], of q's dtype.
        v: values [B, H, N, D], of q's dtype.
        need_output: whether to compute the attention output.
        need_scores: whether to compute the scores.

    Returns:
        Output [B, H, N, D] of q's dtype (None unless needed), scores [B, H, N] f32 (None
        unless needed), and natural-log row log-sum-exp [B, H, N] f32 (None where torch's own
        attention keeps it to itself).  Not differentiable.

    Raises:
        ValueError: for a wrong shape, dtype or device; for inputs that require grad while grad
            mode is on; where neither output nor scores are needed.
    """
    check_axes("q", q, "B H N D")
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, q.shape, "like q")
        check_dtype(name, tensor, (q.dtype,))
        check_same_device(name, tensor, "q", q)
    check_dtype("q", q, FLOAT_DTYPES)
    check_no_grad(
        "attention_with_scores", "has no derivative; call it under torch.no_grad()", q=q, k=k, v=v
    )
    if not need_output and not need_scores:
        raise ValueError("need_output or need_scores must be True, got False for both")
    if q.device.type == "cpu":
        return cpu.attention_with_scores(q, k, v, need_output, need_scores)
    out = F.scaled_dot_product_attention(q, k, v) if need_output else None
    return out, token_scores(q, k) if need_scores else None, None
