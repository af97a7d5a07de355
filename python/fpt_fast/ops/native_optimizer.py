"""``clipped_adam`` of the C++ extension: gradients clipped by their norm, and a step of Adam.

No op of the model's, as ``native_records``: the trainer calls it where the extension is there, and
torch's own optimiser elsewhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fpt_fast.ops.native import level
from fpt_fast.ops.native_reasons import native_missing

_ops = torch.ops.fpt_native


def has_clipped_adam() -> bool:
    """True where the extension is there; it takes contiguous f32 on the CPU."""
    return native_missing() is None


@torch.no_grad()
def clipped_adam(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: tuple[Tensor, Tensor],
    steps: Tensor,
    *,
    rate: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    decoupled: bool,
    clip_norm: float,
) -> Tensor:
    """Scale gradients to a norm of at most ``clip_norm``, and make a step of AdamW (``decoupled``)
    or Adam; returns the norm [] before that.

    Parameters change in place, ``moments`` (running means of the gradients and of their squares,
    one parameter after the other, [N] each) and ``steps`` [parameters], too; gradients stay as they
    are.  As in torch, an infinite norm makes finite gradients 0, and one that is NaN makes all of
    them NaN.  The result is the same from run to run, with any number of threads.
    """
    settings = (rate, *betas, eps, decay, decoupled, clip_norm, level())
    norm: Tensor = _ops.clipped_adam(parameters, gradients, *moments, steps, *settings)
    return norm
