"""A frozen block's linear maps: by ``frozen_linear`` where it runs in tiles, else by their modules.

The modules stay what they are, with their weights, hooks and gradients; only their call is
replaced, and only where nobody could tell but by the clock and the last bit.
"""

from typing import TypeGuard

import timm.layers
import timm.models.vision_transformer
import torch
from torch import Tensor, nn

from fpt_fast.ops import frozen_linear
from fpt_fast.ops.implementation import unsupported_reasons

# What is known to be two linear maps, and to be factors of the channels.
_MLPS: tuple[type, ...] = (timm.layers.Mlp,)  # type: ignore[attr-defined]
_SCALES: tuple[type, ...] = (timm.models.vision_transformer.LayerScale,)  # type: ignore[attr-defined]
# Below it, packing the weights takes longer than the products.
FEWEST_ROWS = 128


class LayerScale(nn.Module):
    """Factors of the channels [C], as Hugging Face's models have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear maps around an activation."""

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = activation
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


def apply_linear(linear: nn.Module, x: Tensor) -> Tensor:
    """``linear(x)``."""
    if not _runs_in_tiles(linear, x):
        return linear(x)  # type: ignore[no-any-return]
    return frozen_linear(x, linear.weight, linear.bias)


def add_linear(x: Tensor, linear: nn.Module, inner: Tensor, scale: nn.Module) -> Tensor:
    """``x + scale(linear(inner))``."""
    is_known = type(scale) in (nn.Identity, LayerScale, *_SCALES) and not _is_watched(scale)
    if not is_known or not _runs_in_tiles(linear, inner):
        return x + scale(apply_linear(linear, inner))  # type: ignore[no-any-return]
    gamma = getattr(scale, "gamma", None)
    return frozen_linear(inner, linear.weight, linear.bias, residual=x, scale=gamma)


def add_mlp(x: Tensor, mlp: nn.Module, inner: Tensor, scale: nn.Module) -> Tensor:
    """``x + scale(mlp(inner))``."""
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    if not _is_two_maps(mlp) or not isinstance(fc2, nn.Module) or not _runs_in_tiles(fc1, inner):
        return x + scale(mlp(inner))  # type: ignore[no-any-return]
    hidden = frozen_linear(inner, fc1.weight, fc1.bias, activation="gelu")
    return add_linear(x, fc2, hidden, scale)


def _is_two_maps(mlp: nn.Module) -> bool:
    """Whether it is fc2(gelu(fc1(x))) and nothing else, and nobody looks inside."""
    if type(mlp) not in (Mlp, *_MLPS) or any(_is_watched(part) for part in mlp.modules()):
        return False
    drops = [part for part in mlp.children() if isinstance(part, nn.Dropout)]
    return (
        type(mlp.act) is nn.GELU
        and mlp.act.approximate == "none"
        and type(getattr(mlp, "norm", None)) in (nn.Identity, type(None))
        and all(not drop.training or drop.p == 0 for drop in drops)
    )


def _is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _runs_in_tiles(linear: object, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether this is a frozen map of many rows, called plainly, on a processor with tiles."""
    if type(linear) is not nn.Linear or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return False
    if x.numel() < FEWEST_ROWS * x.shape[-1] or _is_watched(linear):
        return False
    is_traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if is_traced or torch.is_autocast_enabled("cpu"):
        return False
    tensors = [t for t in (x, linear.weight, linear.bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return not unsupported_reasons("frozen_linear", "native", *tensors)
