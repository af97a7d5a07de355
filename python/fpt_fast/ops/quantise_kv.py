"""``quantise_kv``: kept keys and values in 8 bits, and back."""

import torch
from torch import Tensor

from fpt_fast.ops import library as _library
from fpt_fast.ops.checks import (
    EIGHT_BIT_DTYPES,
    check_axes,
    check_dtype,
    check_no_grad,
    check_positive,
    check_same_device,
    check_shape,
)

_STORED = (torch.float16, torch.bfloat16, torch.float32)


def quantise_kv(
    kv: Tensor, dtype: torch.dtype = torch.int8, *, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Store kept keys and values in 8 bits, as ``prompt_attention`` reads them with ``scales``.

    Symmetric: keys by channel, whose largest of the ``K`` tokens becomes the largest value of
    ``dtype`` (127, 448 or 57344), values by token.  So that

        k = kv8[:, :, 0] * k_scales[..., None, :],    v = kv8[:, :, 1] * v_scales[..., None]

    (``dequantise_kv``).  Rounding is to nearest, ties to even; arithmetic in f32, the same bits
    from every implementation.  A channel or token that is all zero, or whose scale would be below
    the smallest normal f32, becomes 0 with scale 0.  NaN and infinities are refused on the CPU; on
    other devices, where looking would stall the stream, their channel or token becomes 0 with
    scale NaN, so that every use of it is NaN.

    Args:
        kv: kept keys and values [M, L, 2, H, K, D], f16, bf16 or f32, any strides; M may be 0.
        dtype: int8, float8_e4m3fn or float8_e5m2.
        impl: ``"auto"`` or the name of an implementation.

    Returns:
        kv8 [M, L, 2, H, K, D] of ``dtype``, k_scales [M, L, H, D] f32 and v_scales [M, L, H, K]
        f32, all contiguous.  Not differentiable.

    Raises:
        ValueError: for a wrong shape or dtype; for values that are not finite on the CPU; for a
            ``kv`` that requires grad while grad mode is on; for an implementation that cannot run.
    """
    check_axes("kv", kv, "M L 2 H K D")
    check_shape("kv", kv, (*kv.shape[:2], 2, *kv.shape[3:]), "with keys and values in its 3rd axis")
    check_positive("kv", kv, 4, "K")
    check_positive("kv", kv, 5, "D")
    check_dtype("kv", kv, _STORED)
    if dtype not in EIGHT_BIT_DTYPES:
        raise ValueError(f"dtype must be int8 or float8_e4m3fn or float8_e5m2, got {dtype}")
    check_no_grad("quantise_kv", "has no derivative; call it under torch.no_grad()", kv=kv)
    kv8, k_scales, v_scales = _library.ops.quantise_kv(kv, dtype, impl)
    return kv8, k_scales, v_scales


def dequantise_kv(
    kv8: Tensor, k_scales: Tensor, v_scales: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Keys and values [M, L, 2, H, K, D] of ``dtype`` from what ``quantise_kv`` returned.

    For looking at features and for tests: ``prompt_attention`` reads the 8-bit form itself.
    Products are in f32.  Raises ``ValueError`` for a wrong shape, dtype or device.
    """
    check_axes("kv8", kv8, "M L 2 H K D")
    check_dtype("kv8", kv8, EIGHT_BIT_DTYPES)
    images, layers, _, heads, kept, width = kv8.shape
    check_shape("k_scales", k_scales, (images, layers, heads, width), "[M, L, H, D]")
    check_shape("v_scales", v_scales, (images, layers, heads, kept), "[M, L, H, K]")
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        check_dtype(name, scales, (torch.float32,))
        check_same_device(name, scales, "kv8", kv8)
    keys, values = kv8.float().unbind(dim=2)
    wide = torch.stack([keys * k_scales.unsqueeze(-2), values * v_scales.unsqueeze(-1)], dim=2)
    return wide.to(dtype)
