"""8-bit keys and values, in place: one block of f32 becomes what 8 bits can hold of it."""

import torch
from torch import Tensor


def quantise_block(block: Tensor, scales: Tensor, dtype: torch.dtype, axis: int) -> None:
    """Scale ``block`` [H, K, D] f32 to the range of ``dtype``, rounded; write its scales [H, ·].

    As ``reference.quantise_kv`` does, bit for bit; the conversion to fp8 rounds by itself.
    """
    # A tensor: torch divides a number by a tensor by way of its reciprocal.
    largest = block.new_tensor(127.0 if dtype == torch.int8 else torch.finfo(dtype).max)
    top = torch.maximum(block.amax(dim=axis), -block.amin(dim=axis))  # NaN where there is any
    torch.div(top, largest, out=scales)
    is_finite = top.isfinite()
    is_plain = (scales >= torch.finfo(torch.float32).tiny) & is_finite
    block.mul_((largest / top).unsqueeze(axis))
    if not bool(is_plain.all()):
        block.masked_fill_(~is_plain.unsqueeze(axis), 0.0)
        scales.masked_fill_(~is_plain, 0.0).masked_fill_(~is_finite, torch.nan)
    if dtype == torch.int8:
        block.round_()
