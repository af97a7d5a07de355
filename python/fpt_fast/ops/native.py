"""Implementation ``native`` of the ops: the C++ extension, whose sources are in ``csrc/``."""

import os

import torch
from torch import Tensor

_ops = torch.ops.fpt_native


def level() -> str:
    """Level of kernels that the environment asks for; empty for the best one."""
    return os.environ.get("FPT_NATIVE_LEVEL", "")


def select_tokens(
    scores: Tensor, k: Tensor, v: Tensor, keep: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Radix selection, then one pass of copies that convert as they go."""
    kv, index = _ops.select_tokens(scores, k, v, keep, dtype, level())
    return kv, index
