"""The random choices of the augmentation, for a whole batch at once.

Numbers come from a hash of (seed, epoch, image, counter), not from a generator with a state: an
image's choices depend on nothing else, in whatever order and company it is drawn.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fpt_fast.config import AugmentConfig

_CROP_ATTEMPTS = 10
UNIFORMS = 5 + 4 * _CROP_ATTEMPTS
"""Numbers that one image takes."""

_MASK = (1 << 64) - 1
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True, slots=True)
class AugmentationDraw:
    """The random choices for one image; ``crop`` is (top, left, height, width) in pixels."""

    flip_horizontally: bool
    flip_vertically: bool
    brightness: float
    contrast: float
    contrast_first: bool
    crop: tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class AugmentationDraws:
    """The random choices for ``B`` images, [B] each: bool, bool, f64, f64, bool; ``crop`` [B, 4]
    i64 is (top, left, height, width) in pixels of the original image."""

    flip_horizontally: Tensor
    flip_vertically: Tensor
    brightness: Tensor
    contrast: Tensor
    contrast_first: Tensor
    crop: Tensor

    def of(self, index: int) -> AugmentationDraw:
        """The choices for one of the images."""
        top, left, height, width = self.crop[index].tolist()
        return AugmentationDraw(
            flip_horizontally=bool(self.flip_horizontally[index]),
            flip_vertically=bool(self.flip_vertically[index]),
            brightness=float(self.brightness[index]),
            contrast=float(self.contrast[index]),
            contrast_first=bool(self.contrast_first[index]),
            crop=(top, left, height, width),
        )


def choose(
    uniform: Tensor,
    heights: Tensor,
    widths: Tensor,
    config: AugmentConfig,
    size: tuple[int, int],
) -> AugmentationDraws:
    """Turn ``uniform`` [B, UNIFORMS] f64 in [0, 1) into choices for images of ``heights`` [B] and
    ``widths`` [B] pixels, distributed as torchvision's.

    The ratio of a crop is relative to that of the input of ``size`` (height, width): for a square
    one it is as published, and for a tall one crops are tall.
    """
    return AugmentationDraws(
        flip_horizontally=uniform[:, 0] < config.horizontal_flip,
        flip_vertically=uniform[:, 1] < config.vertical_flip,
        brightness=1.0 + config.brightness * (2.0 * uniform[:, 2] - 1.0),
        contrast=1.0 + config.contrast * (2.0 * uniform[:, 3] - 1.0),
        contrast_first=uniform[:, 4] < 0.5,
        crop=_choose_crops(uniform[:, 5:], heights.double(), widths.double(), config, size),
    )


def _choose_crops(
    uniform: Tensor,
    height: Tensor,
    width: Tensor,
    config: AugmentConfig,
    size: tuple[int, int],
) -> Tensor:  # [B, 4] i64
    """The first of ten attempts whose crop fits, as torchvision's RandomResizedCrop does it."""
    ratios = config.crop_ratio
    if size[0] != size[1]:
        ratios = (ratios[0] * size[1] / size[0], ratios[1] * size[1] / size[0])
    low, high = (math.log(ratio) for ratio in ratios)
    least, most = config.crop_area
    attempts = uniform.view(len(uniform), _CROP_ATTEMPTS, 4)
    rows, columns = height[:, None], width[:, None]
    area = rows * columns * (least + (most - least) * attempts[:, :, 0])
    ratio = torch.exp(low + (high - low) * attempts[:, :, 1])
    w, h = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()
    fits = (w > 0) & (w <= columns) & (h > 0) & (h <= rows)  # [B, attempts]
    top = (attempts[:, :, 2] * (rows - h + 1)).floor()
    left = (attempts[:, :, 3] * (columns - w + 1)).floor()
    first = fits.to(torch.uint8).argmax(dim=1)  # argmax takes the first of equals
    image = torch.arange(len(first), device=first.device)
    tried = torch.stack((top, left, h, w), dim=2)[image, first]
    crop = torch.where(fits.any(dim=1)[:, None], tried, _central_crops(height, width, ratios))
    return crop.long()


def _central_crops(height: Tensor, width: Tensor, ratios: tuple[float, float]) -> Tensor:
    """Where no crop fits an image this long: the largest central one of a ratio in range."""
    least, most = ratios
    ratio = width / height
    h = torch.where(ratio < least, (width / least).round(), height)
    w = torch.where(ratio > most, (height * most).round(), width)
    h, w = h.clamp(min=1).minimum(height), w.clamp(min=1).minimum(width)
    return torch.stack((((height - h) / 2).floor(), ((width - w) / 2).floor(), h, w), dim=1)


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several small numbers (splitmix64 rounds)."""
    state = 0
    for number in numbers:
        state = (state + number + _STEP) & _MASK
        state = ((state ^ (state >> 30)) * _FIRST) & _MASK
        state = ((state ^ (state >> 27)) * _SECOND) & _MASK
        state ^= state >> 31
    return state >> 1


def hashed_uniform(seed: int | Tensor, positions: Tensor, count: int = UNIFORMS) -> Tensor:
    """``count`` numbers in [0, 1) for each of ``positions`` [B] i64: [B, count] f64.

    Row *b* depends on ``seed`` (one for all, or [B] i64) and ``positions[b]`` alone: splitmix64 of
    a counter, 53 bits.
    """
    first = seed[:, None] if isinstance(seed, Tensor) else _signed(seed)
    counter = positions[:, None] * count + torch.arange(count, device=positions.device)
    state = counter * _signed(_STEP) + first  # i64 wraps around, as the hash wants
    state = (state ^ _shift(state, 30)) * _signed(_FIRST)
    state = (state ^ _shift(state, 27)) * _signed(_SECOND)
    state = state ^ _shift(state, 31)
    return _shift(state, 11).double() * 2.0**-53


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; that of i64 keeps the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >= 1 << 63 else number
