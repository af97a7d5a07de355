"""``resample_images`` of the C++ extension: augmented side inputs out of shrunk images.

No op of the model's, as ``native_records``: ``images`` calls it where the extension is there, and
computes the same with torch elsewhere.
"""

import torch
from torch import Tensor

from fpt_fast.ops.native import level
from fpt_fast.ops.native_reasons import native_missing

_ops = torch.ops.fpt_native


def can_resample_images(levels: Tensor) -> bool:
    """True where the extension is there, and takes ``levels`` [M, 3, h, w]: u8 or u16, contiguous,
    on the CPU."""
    if levels.device.type != "cpu" or levels.dtype not in (torch.uint8, torch.uint16):
        return False
    return levels.is_contiguous() and native_missing() is None


def resample_images(
    levels: Tensor,
    rows: Tensor,
    tones: Tensor,
    vertical: tuple[Tensor, Tensor],
    horizontal: tuple[Tensor, Tensor],
    normalisation: Tensor,
) -> Tensor:
    """Images ``rows`` [B] i64 of ``levels``, resampled: [B, 3, H, W] f32.

    A level becomes ``clamp(scale * level + shift, low, high)``, ``tones`` [4, B] f32 being these
    four; then output rows are sums of rows, ``vertical`` (index [B, H, taps] i64, weight f32), and
    columns alike; then ``normalisation`` [2, 3] f32 scales and shifts a channel.  All but ``rows``,
    which may be a column of something, are contiguous.
    """
    out: Tensor = _ops.resample_images(
        levels, rows.contiguous(), tones, *vertical, *horizontal, normalisation, level()
    )
    return out
