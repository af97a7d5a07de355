"""``frozen_attention``: a frozen layer's attention together with its row log-sum-exp."""

from torch import Tensor

from fpt_fast.ops import library as _library
from fpt_fast.ops.checks import check_no_grad, check_positive, check_self_attention


def frozen_attention(
    q: Tensor, k: Tensor, v: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Attention ``softmax(q kᵀ / √D) v`` of a layer without gradient, and its log-sum-exp.

    The log-sum-exp saves ``token_scores`` its first pass.  Memory beyond inputs and outputs is
    O(N), but for ``impl="reference"``.  Implementations differ by rounding only.

    Args:
        q: queries [B, H, N, D], f16, bf16, f32 or f64, any strides.
        k: keys [B, H, N, D], of q's dtype and device.
        v: values [B, H, N, D], of q's dtype and device.
        impl: ``"auto"`` or the name of an implementation (``explain("frozen_attention", q, k,
            v)`` lists them).

    Returns:
        Output [B, H, N, D] of q's dtype, in memory [B, N, H, D], so that merging the heads copies
        nothing; and natural-log row log-sum-exp [B, H, N] f32.  Not differentiable.

    Raises:
        ValueError: for a wrong shape, dtype or device; for inputs that require grad while grad
            mode is on; for an implementation that cannot run.
    """
    check_self_attention(q, k, v)
    check_positive("q", q, 2, "N")
    check_positive("q", q, 3, "D")
    check_no_grad(
        "frozen_attention", "has no derivative; call it under torch.no_grad()", q=q, k=k, v=v
    )
    out, lse = _library.ops.frozen_attention(q, k, v, impl)
    return out, lse
