"""``frozen_linear``: a linear map of frozen weights with what comes right after it."""

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

ACTIVATIONS = ("none", "gelu")


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Compute ``act(x weightᵀ + bias)``, or ``residual + scale · (x weightᵀ + bias)``.

    Sums are f32, or f64 for f64; ``"native"`` rounds once, at the end, and packs the weights as it
    goes, so that nobody keeps a second copy of them.  The result is the same from run to run.

    Args:
        x: rows [..., I], f16, bf16, f32 or f64.
        weight: [O, I], of x's dtype and device, as are the others.
        bias: [O], or None.
        activation: ``"none"`` or ``"gelu"``, the exact one; not with a residual.
        residual: [..., O], added to the result, or None.
        scale: [O], which the map is multiplied by before it is added to the residual, or None.
        impl: ``"auto"`` or the name of an implementation.

    Returns:
        [..., O] of x's dtype, contiguous.

    Raises:
        ValueError: for a wrong shape, dtype or device; for tensors that require grad; for an
            implementation that cannot run.
    """
    check_axes("weight", weight, "O I")
    if x.dim() < 1:
        raise ValueError(f"x must be [..., I], got shape {tuple(x.shape)}")
    check_shape("x", x, (*x.shape[:-1], weight.shape[1]), "by weight's I")
    check_dtype("x", x, FLOAT_DTYPES)
    for name, vector in (("bias", bias), ("scale", scale)):
        if vector is not None:
            check_shape(name, vector, weight.shape[:1], "by weight's O")
    if residual is not None:
        check_shape("residual", residual, (*x.shape[:-1], weight.shape[0]), "like the result")
    given = (("weight", weight), ("bias", bias), ("residual", residual), ("scale", scale))
    for name, tensor in given:
        if tensor is not None:
            check_dtype(name, tensor, (x.dtype,))
            check_same_device(name, tensor, "x", x)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if residual is not None and activation != "none":
        raise ValueError(f"activation must be none with a residual, got {activation!r}")
    if scale is not None and residual is None:
        raise ValueError("scale must come with a residual, got none; scale weight and bias instead")
    check_no_grad("frozen_linear", "has no derivative; use torch.nn.Linear", x=x, **dict(given))
    out: Tensor = _library.ops.frozen_linear(x, weight, bias, activation, residual, scale, impl)
    return out
