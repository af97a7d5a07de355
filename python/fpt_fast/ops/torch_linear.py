"""Implementation ``torch`` of ``frozen_linear``: torch's own operations, one after the other."""

from torch import Tensor
from torch.nn import functional


def frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """Each operation rounds to x's dtype."""
    out = functional.linear(x, weight, bias)
    if activation == "gelu":
        out = functional.gelu(out)
    if scale is not None:
        out = out * scale
    return out if residual is None else residual + out
