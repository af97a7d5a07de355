"""``select_tokens``: keep the keys and values of the highest scores."""

import torch
from torch import Tensor

from fpt_fast.ops import library as _library
from fpt_fast.ops.checks import (
    FLOAT_DTYPES,
    check_axes,
    check_dtype,
    check_no_grad,
    check_same_device,
    check_shape,
)


def select_tokens(
    scores: Tensor,
    k: Tensor,
    v: Tensor,
    keep: int,
    *,
    impl: str = "auto",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Copy the keys and values of the ``keep`` highest scores of every head.

    On ties the lower index is kept; kept tokens stand in ascending token order.  Infinite
    scores are ordered like any other.  NaN has no order and is refused on the CPU; on other
    devices, where looking would stall the stream, it counts as minus infinity.

    Args:
        scores: [B, H, N], f16, bf16, f32 or f64.
        k: keys [B, H, N, D], f16, bf16, f32 or f64, any strides.
        v: values [B, H, N, D], of k's dtype.
        keep: number of tokens ``K`` to keep, in 1..N.
        impl: ``"auto"`` or the name of an implementation.
        dtype: dtype of the copies, f16, bf16, f32 or f64; None for k's own, which makes the
            copies exact.

    Returns:
        kv [B, 2, H, K, D] of ``dtype`` (keys, then values) and index [B, H, K] i32.
        Not differentiable.

    Raises:
        ValueError: for a wrong shape, dtype, device or ``keep``; for NaN scores on the CPU; for
            inputs that require grad while grad mode is on; for an implementation that
            cannot run.
    """
    check_axes("k", k, "B H N D")
    check_shape("scores", scores, k.shape[:3], "like k without D")
    check_shape("v", v, k.shape, "like k")
    check_dtype("scores", scores, FLOAT_DTYPES)
    check_dtype("k", k, FLOAT_DTYPES)
    check_dtype("v", v, (k.dtype,))
    check_same_device("scores", scores, "k", k)
    check_same_device("v", v, "k", k)
    if isinstance(keep, bool) or not isinstance(keep, int | torch.SymInt):
        raise ValueError(f"keep must be an int, got {type(keep).__name__}")
    if not 1 <= keep <= k.shape[2]:
        raise ValueError(f"keep must be in 1..{k.shape[2]}, the number of tokens, got {keep}")
    kept_dtype = k.dtype if dtype is None else dtype
    if kept_dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype must be float16 or bfloat16 or float32 or float64, got {dtype}")
    remedy = "has no derivative; call it under torch.no_grad()"
    check_no_grad("select_tokens", remedy, scores=scores, k=k, v=v)
    kv, index = _library.ops.select_tokens(scores, k, v, keep, kept_dtype, impl)
    return kv, index
