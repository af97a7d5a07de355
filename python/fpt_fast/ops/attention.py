"""``attention_with_scores``: a layer's attention and its token scores from one pass."""

from dataclasses import replace

from torch import Tensor

from fpt_fast.ops.checks import check_no_grad, check_self_attention
from fpt_fast.ops.frozen_attention import frozen_attention
from fpt_fast.ops.implementation import resolve
from fpt_fast.ops.token_scores import token_scores


def attention_with_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    need_output: bool = True,
    need_scores: bool = True,
    impl: str = "auto",
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Attention ``softmax(q kᵀ / √D) v`` of a frozen layer together with its global token scores.

    On a CPU one product ``q kᵀ`` and one pass of exponentials serve both, in blocks; without the
    C++ extension and with bf16 in hardware, torch's fused attention runs twice.  Elsewhere
    ``frozen_attention`` gives the output and the log-sum-exp, with which ``token_scores`` needs
    its second pass only.  No path stores a map of N x N: beyond copies of its inputs and outputs,
    the scratch of the CPU path is at most 16 MB (f64: 32 MB), whatever N.

    Args:
        q: queries [B, H, N, D], f16, bf16, f32 or f64, any strides.
        k: keys [B, H, N, D], of q's dtype.
        v: values [B, H, N, D], of q's dtype.
        need_output: whether to compute the attention output.
        need_scores: whether to compute the scores.
        impl: ``"auto"`` or the implementation of ``frozen_attention``.

    Returns:
        Output [B, H, N, D] of q's dtype (None unless needed), scores [B, H, N] f32 (None
        unless needed), and natural-log row log-sum-exp [B, H, N] f32 (None where scores alone
        are needed and the CPU's own way does not give it).  Not differentiable.

    Raises:
        ValueError: for a wrong shape, dtype or device; for inputs that require grad while grad
            mode is on; where neither output nor scores are needed; for an implementation that
            cannot run.
    """
    check_self_attention(q, k, v)
    check_no_grad(
        "attention_with_scores", "has no derivative; call it under torch.no_grad()", q=q, k=k, v=v
    )
    if not need_output and not need_scores:
        raise ValueError("need_output or need_scores must be True, got False for both")
    if scores_come_free(q, impl):
        chosen = resolve("frozen_attention", impl, (q, k, v))
        function = replace(chosen, function="attention_with_scores").load()
        out, scores, lse = function(q, k, v, need_output, need_scores)
        return out, scores, lse
    out, lse = frozen_attention(q, k, v, impl=impl) if need_output else (None, None)
    return out, token_scores(q, k, lse=lse) if need_scores else None, lse


def scores_come_free(q: Tensor, impl: str = "auto") -> bool:
    """Whether the attention of queries ``q`` through ``impl`` computes their scores on its way."""
    return q.device.type == "cpu" and impl in ("auto", "native", "cpu")
