"""``token_scores``: how much every token matters to its head."""

import torch
from torch import Tensor

from fpt_fast.ops import library as _library
from fpt_fast.ops.checks import (
    FLOAT_DTYPES,
    check_axes,
    check_dtype,
    check_no_grad,
    check_positive,
    check_same_device,
    check_shape,
)
from fpt_fast.records import Importance

IMPORTANCES: tuple[Importance, ...] = ("global", "class_token")


def token_scores(
    q: Tensor,
    k: Tensor,
    *,
    importance: Importance = "global",
    lse: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Score every token by the attention that it gets, without storing the attention map.

    With ``A = softmax(q kᵀ / √D)``, ``"global"`` is the mean of ``A`` over all queries and
    ``"class_token"`` its first row.  Either way the scores of one head sum to 1.

    Args:
        q: queries [B, H, N, D], f16, bf16, f32 or f64, any strides.
        k: keys [B, H, N, D], of q's dtype and device.
        importance: ``"global"`` or ``"class_token"``.
        lse: natural-log row log-sum-exp [B, H, N] f32 of ``q kᵀ / √D``, where the attention
            already has it; saves the first pass.  ``"class_token"`` does not need it.
        impl: ``"auto"`` or the name of an implementation (``explain("token_scores", q, k)``).

    Returns:
        Scores [B, H, N] f32.  Not differentiable.  Memory beyond it is O(N).

    Raises:
        ValueError: for a wrong shape, dtype, device or importance; for inputs that require
            grad while grad mode is on; for an implementation that cannot run.
    """
    check_axes("q", q, "B H N D")
    check_shape("k", k, q.shape, "like q")
    check_positive("q", q, 2, "N")
    check_positive("q", q, 3, "D")
    check_dtype("q", q, FLOAT_DTYPES)
    check_dtype("k", k, (q.dtype,))
    check_same_device("k", k, "q", q)
    if importance not in IMPORTANCES:
        raise ValueError(f"importance must be 'global' or 'class_token', got {importance!r}")
    if lse is not None:
        check_shape("lse", lse, q.shape[:3], "like q without D")
        check_dtype("lse", lse, (torch.float32,))
        check_same_device("lse", lse, "q", q)
    check_no_grad("token_scores", "has no derivative; call it under torch.no_grad()", q=q, k=k)
    scores: Tensor = _library.ops.token_scores(q, k, importance, lse, impl)
    return scores
