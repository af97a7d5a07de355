"""``side_attention``: self-attention of the side network, whose heads are narrow."""

import torch
from torch import Tensor
from torch.nn import functional

from fpt_fast.ops import library as _library
from fpt_fast.ops.checks import (
    FLOAT_DTYPES,
    check_axes,
    check_dtype,
    check_positive,
    check_same_device,
    check_shape,
)
from fpt_fast.ops.implementation import AUTO, resolve

_TORCH = "torch"


def side_attention(q: Tensor, k: Tensor, v: Tensor, *, impl: str = "auto") -> Tensor:
    """Attention ``softmax(q kᵀ / √D) v`` with gradients to all three.

    ``"torch"`` is ``scaled_dot_product_attention`` with its own gradient; ``"auto"`` is that, too,
    in compiled code, which knows it.  The result is the same from run to run.

    Args:
        q: queries [B, H, Q, D], f16, bf16, f32 or f64, any strides.
        k: keys [B, H, T, D], of q's dtype and device.
        v: values [B, H, T, D], of q's dtype and device.
        impl: ``"auto"`` or the name of an implementation.

    Returns:
        [B, H, Q, D] of q's dtype.

    Raises:
        ValueError: for a wrong shape, dtype or device; for an implementation that cannot run.
    """
    check_axes("q", q, "B H Q D")
    check_axes("k", k, "B H T D")
    check_shape("k", k, (*q.shape[:2], k.shape[2], q.shape[3]), "by its own T and q's B, H, D")
    check_shape("v", v, k.shape, "like k")
    check_positive("q", q, 3, "D")
    check_positive("k", k, 2, "T")
    check_dtype("q", q, FLOAT_DTYPES)
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(name, tensor, (q.dtype,))
        check_same_device(name, tensor, "q", q)
    if impl == AUTO:
        is_compiling = torch.compiler.is_compiling()
        impl = _TORCH if is_compiling else resolve("side_attention", impl, (q, k, v)).name
    if impl == _TORCH:
        return functional.scaled_dot_product_attention(q, k, v)
    out, _ = _library.call("side_attention", q, k, v, impl)
    attended: Tensor = out
    return attended
