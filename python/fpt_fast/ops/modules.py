"""What a module's forward asks before it gives its parts' weights to an op."""

from typing import TypeGuard, TypeVar

import torch
from torch import Tensor, nn

_Kind = TypeVar("_Kind", bound=nn.Module)


def is_as_made(module: nn.Module, kind: type[_Kind]) -> TypeGuard[_Kind]:
    """Whether ``module`` does what its ``kind`` does: no subclass of it, and nobody hooked it."""
    return type(module) is kind and not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def multiplies_in_bf16(device: str) -> bool:
    """Whether the present autocast asks for products in bf16 and nothing compiles them."""
    asked = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return asked == torch.bfloat16 and not torch.compiler.is_compiling()


def is_trained_linear(module: nn.Module, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether ``module`` of ``x`` is ``trained_linear``: a plain linear map with weights in f32,
    whose product is to be in bf16, on a CPU."""
    return (
        x.is_cpu
        and multiplies_in_bf16("cpu")
        and is_as_made(module, nn.Linear)
        and module.weight.dtype == torch.float32
    )
