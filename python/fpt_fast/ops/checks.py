"""Checks of arguments: each error names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EIGHT_BIT_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def check_axes(name: str, tensor: Tensor, axes: str) -> None:
    """Refuse a tensor whose number of axes differs from ``axes``, written like ``"B H N D"``."""
    if tensor.dim() != len(axes.split()):
        raise ValueError(
            f"{name} must be [{', '.join(axes.split())}], got shape {tuple(tensor.shape)}"
        )


def check_shape(name: str, tensor: Tensor, expected: Sequence[int], why: str) -> None:
    """Refuse a tensor of another shape than ``expected``; ``why`` says where that comes from."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must be {tuple(expected)} {why}, got {tuple(tensor.shape)}")


def check_dtype(name: str, tensor: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """Refuse a tensor of a dtype outside ``allowed``."""
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor on another device than ``other``."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other.device} like {other_name}, got {tensor.device}")


def check_self_attention(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse q, k, v that are not [B, H, N, D] of one floating dtype and device."""
    check_axes("q", q, "B H N D")
    for name, tensor in (("k", k), ("v", v)):
        check_shape(name, tensor, q.shape, "like q")
        check_dtype(name, tensor, (q.dtype,))
        check_same_device(name, tensor, "q", q)
    check_dtype("q", q, FLOAT_DTYPES)


def check_positive(name: str, tensor: Tensor, axis: int, letter: str) -> None:
    """Refuse a tensor whose ``axis`` is empty where a softmax or a dot product runs along it."""
    if tensor.shape[axis] < 1:
        raise ValueError(f"{name} must have {letter} of at least 1, got {tuple(tensor.shape)}")


def check_no_grad(op: str, remedy: str, **tensors: Tensor | None) -> None:
    """Refuse tensors that would need a gradient that ``op`` does not compute."""
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must not require grad: {op} {remedy}")


def check_no_nan(scores: Tensor) -> None:
    """Refuse NaN scores on the CPU, where looking is cheap; elsewhere it would stall the stream."""
    if scores.device.type != "cpu":
        return
    bad = scores.isnan()
    if bad.any():
        image, head, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"scores must not be NaN, got NaN at image {image}, head {head}, token {token} (of "
            f"{int(bad.sum())}); look for NaN or overflow in the frozen model's q and k"
        )


def check_finite_scales(kv: Tensor, k_scales: Tensor, v_scales: Tensor) -> None:
    """Refuse kv [M, L, 2, H, K, D] that held NaN or infinity on the CPU: its scales are NaN."""
    if kv.device.type != "cpu" or not (k_scales.isnan().any() or v_scales.isnan().any()):
        return
    bad = ~kv.isfinite()
    image, layer, part, head, token, _ = bad.nonzero()[0].tolist()
    raise ValueError(
        f"kv must be finite, got NaN or infinity in {int(bad.sum())} of {kv.numel()} values, the "
        f"first in the {('keys', 'values')[part]} of image {image}, layer {layer}, head {head}, "
        f"token {token}; look for overflow in the frozen model, or run it in float32"
    )


def check_values_in_range(name: str, index: Tensor, size: int, of: str) -> None:
    """Refuse indices outside [0, size) on the CPU; a GPU's own gather asserts instead."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = index.aminmax()
    if low < 0 or high >= size:
        raise ValueError(
            f"{name} must be in 0..{size - 1} ({of}), got values in {int(low)}..{int(high)}"
        )
