"""``trained_linear``: a linear map whose weights learn, by products of bf16."""

import torch
from torch import Tensor
from torch.nn import functional

from fpt_fast.ops import library as _library
from fpt_fast.ops.checks import FLOAT_DTYPES, check_dtype, check_same_device, check_shape
from fpt_fast.ops.implementation import AUTO, resolve

_TORCH = "torch"
_BF16 = torch.bfloat16


def trained_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Compute ``(x + added) weightᵀ + bias`` by products of bf16; K may be several axes, at any
    strides.  ``added`` is multiplied by itself, a row once, however many rows it is added to.

    ``"native"`` rounds the factors to bf16, as they are read, and nothing else: its sums are f32,
    and so are the gradients', of which that to ``weight`` is one sum over all rows.  It reads a
    view of an image's patches where the pixels are.  ``"torch"`` is torch's own product of bf16
    and gradient, whose results are rounded to bf16, too; ``"auto"`` is that in compiled code.  The
    result is the same from run to run, with any number of threads.

    Args:
        x: rows [..., K], f16, bf16, f32 or f64.
        weight: [O, K], f32 or f64.
        bias: [O] of weight's dtype, or None.
        added: rows of x's axes, with 1 in place of those that they are the same along; f16, bf16,
            f32 or f64, or None.
        impl: ``"auto"`` or the name of an implementation.

    Returns:
        [..., O] of weight's dtype, contiguous.

    Raises:
        ValueError: for a wrong shape, dtype or device; for an implementation that cannot run.
    """
    axes = weight.dim() - 1
    if axes < 1:
        raise ValueError(f"weight must be [O, K], got shape {tuple(weight.shape)}")
    if x.dim() < axes:
        raise ValueError(f"x must be [..., K] with weight's K, got shape {tuple(x.shape)}")
    check_shape("x", x, (*x.shape[: x.dim() - axes], *weight.shape[1:]), "by weight's K")
    check_dtype("x", x, FLOAT_DTYPES)
    check_dtype("weight", weight, (torch.float32, torch.float64))
    check_same_device("weight", weight, "x", x)
    if bias is not None:
        check_shape("bias", bias, weight.shape[:1], "by weight's O")
        check_dtype("bias", bias, (weight.dtype,))
        check_same_device("bias", bias, "x", x)
    if added is not None:
        _check_added(added, x, axes)
    if impl == AUTO:
        args = (x, weight, bias, added)
        is_compiling = torch.compiler.is_compiling()
        impl = _TORCH if is_compiling else resolve("trained_linear", impl, args).name
    if impl == _TORCH:
        product = _by_torch(x, weight, bias)
        return product if added is None else product + _by_torch(added, weight, None)
    out: Tensor = _library.call("trained_linear", x, weight, bias, added, impl)
    return out


def _check_added(added: Tensor, x: Tensor, axes: int) -> None:
    leading = x.dim() - axes
    sizes = added.shape if added.dim() == x.dim() else x.shape
    pairs = zip(sizes[:leading], x.shape[:leading], strict=True)
    expected = (*(1 if size == 1 else full for size, full in pairs), *x.shape[leading:])
    check_shape("added", added, expected, "like x, or 1 along leading axes")
    check_dtype("added", added, FLOAT_DTYPES)
    check_same_device("added", added, "x", x)


def _by_torch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(*x.shape[: x.dim() - weight.dim() + 1], -1).to(_BF16)
    narrow = None if bias is None else bias.to(_BF16)
    return functional.linear(rows, weight.flatten(1).to(_BF16), narrow).to(weight.dtype)
