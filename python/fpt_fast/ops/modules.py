"""What a module's forward asks before it gives its parts' weights to an op."""

from typing import TypeGuard, TypeVar

import torch
from torch import nn

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
