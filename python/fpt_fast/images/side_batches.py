"""Batches of the side input out of shrunk images: augmentation without work per image.

The same choices as ``SideAugmentation`` makes of the full image, by operations on whole batches:

- Brightness and contrast, each clamped, are together one affine map of the levels with one clamp;
  its pivot, the mean grey after a clamped brightness, comes from a histogram of each image.
- Crop, resizing and flips are two passes of a few taps, weighted sums of rows, then of columns.
  Shrinking was a triangle filter already, so the second one is narrower by as much as makes the
  variance of both together that of the one filter of the exact path.
"""

from copy import copy

import torch
from torch import Tensor
from torch.nn import functional

from fpt_fast.config import AugmentConfig
from fpt_fast.images.augmentation import GREY_WEIGHTS
from fpt_fast.images.draws import AugmentationDraws, choose, hashed_uniform
from fpt_fast.images.side_images import SideImages
from fpt_fast.images.transforms import scale_and_shift
from fpt_fast.ops.native_images import can_resample_images, resample_images
from fpt_fast.records import Preprocessing

_BINS = 256
# A few images at a time: what is made of them stays in the processor's cache.
_IMAGES_AT_ONCE = 4


class SideBatches:
    """Network inputs out of ``images``, augmented where ``augmentation`` is given.

    Without it the images must have been shrunk to the input's own size.
    """

    def __init__(
        self,
        images: SideImages,
        preprocessing: Preprocessing,
        augmentation: AugmentConfig | None = None,
    ) -> None:
        self._images = images
        self._size = preprocessing.size
        self._top = images.full_scale
        self._augmentation = augmentation
        self._scale, self._shift = scale_and_shift(
            preprocessing.mean, preprocessing.std, images.full_scale
        )
        stored = (int(images.levels.shape[2]), int(images.levels.shape[3]))
        if augmentation is None and stored != tuple(self._size):
            raise ValueError(
                f"without augmentation, images must be of the side input's size {self._size}, got "
                f"{stored}; shrink them with augmented=False"
            )
        if augmentation is not None:
            self._mean_grey, self._grey = _grey_statistics(images)  # [M], [M, bins]
            self._centres = torch.linspace(0.0, self._top, _BINS, dtype=torch.float64)
        self._taps = [
            2 * -(-max(kept, made) // made) + 1
            for kept, made in zip(stored, self._size, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Memory of the images."""
        return self._images.levels.nbytes

    def to(self, device: torch.device) -> "SideBatches":
        """The same with everything on ``device``, where ``rows`` must be then; nothing that it does
        there waits for the device, or looks at a value of it."""
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
        images = self._images
        moved._images = SideImages(
            images.levels.to(device), images.extents.to(device), images.originals.to(device)
        )
        return moved

    def __call__(self, rows: Tensor, seed: int | Tensor) -> Tensor:
        """Inputs [B, 3, H, W] f32, normalised, of images ``rows`` [B] i64; each image's choices
        depend on ``seed`` (one for all, or [B] i64) and its row alone."""
        if self._augmentation is None:
            return self._normalise(self._levels(rows))
        return self.augment(rows, self.draw(rows, seed))

    def draw(self, rows: Tensor, seed: int | Tensor) -> AugmentationDraws:
        """The choices for images ``rows`` [B] under ``seed``."""
        if self._augmentation is None:
            raise ValueError("there is nothing to draw without an augmentation")
        heights, widths = self._images.originals[rows].unbind(1)
        return choose(hashed_uniform(seed, rows), heights, widths, self._augmentation, self._size)

    def augment(self, rows: Tensor, draws: AugmentationDraws) -> Tensor:
        """Apply ``draws`` [B] to images ``rows`` [B]: [B, 3, H, W] f32, normalised."""
        tone = self._tones(rows, draws)
        vertical = self._resampling(rows, draws, axis=0)
        horizontal = self._resampling(rows, draws, axis=1)
        levels = self._images.levels
        if can_resample_images(levels):
            normalisation = torch.stack((self._scale.view(3), self._shift.view(3)))
            tones = torch.stack([value.view(-1) for value in tone])
            return resample_images(levels, rows, tones, vertical, horizontal, normalisation)
        return self._normalise(self._resample(rows, tone, vertical, horizontal))

    def _resample(
        self,
        rows: Tensor,
        tone: tuple[Tensor, ...],
        vertical: tuple[Tensor, Tensor],
        horizontal: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Levels of [B, 3, H, W] f32 with torch, on any device."""
        device = self._images.levels.device
        out = torch.empty((len(rows), 3, *self._size), device=device)
        step = _IMAGES_AT_ONCE if device.type == "cpu" else max(1, len(rows))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            scale, shift, low, high = (value[part] for value in tone)
            levels = self._levels(rows[part]).float().mul_(scale).add_(shift)
            torch.clamp(levels, low, high, out=levels)
            levels = _weighted_rows(levels, vertical[0][part], vertical[1][part])
            levels = _weighted_rows(levels.mT, horizontal[0][part], horizontal[1][part])
            out[part] = levels.mT
        return out

    def _levels(self, rows: Tensor) -> Tensor:
        levels = self._images.levels
        if levels.dtype == torch.uint16:
            # Not every operation knows u16; picking does not look at the values.
            return levels.view(torch.int16)[rows].view(torch.uint16)
        return levels[rows]

    def _normalise(self, levels: Tensor) -> Tensor:
        return torch.mul(levels, self._scale).add_(self._shift)

    def _tones(self, rows: Tensor, draws: AugmentationDraws) -> tuple[Tensor, ...]:
        """Both colour maps as ``clamp(scale * level + shift, low, high)``, [B, 1, 1, 1] f32 each.

        ``clamp(g(clamp(f(x))))`` of increasing affine f, g is ``g(f(x))`` clamped to the values
        of ``clamp(g)`` at both ends of the range.
        """
        top, brightness, contrast = self._top, draws.brightness, draws.contrast
        mean = self._mean_grey[rows]
        over = (brightness[:, None] * self._centres - top).clamp(min=0.0)  # [B, bins]
        brightened = brightness * mean - (self._grey[rows] * over).sum(dim=1)
        pivot = torch.where(draws.contrast_first, mean, brightened)
        shift = (1.0 - contrast) * pivot
        outer = torch.where(draws.contrast_first, brightness, contrast)
        outer_shift = torch.where(draws.contrast_first, torch.zeros_like(shift), shift)
        whole_shift = torch.where(draws.contrast_first, brightness * shift, shift)
        values = (
            brightness * contrast,
            whole_shift,
            outer_shift.clamp(0.0, top),
            (outer * top + outer_shift).clamp(0.0, top),
        )
        return tuple(value.float().view(-1, 1, 1, 1) for value in values)

    def _resampling(
        self, rows: Tensor, draws: AugmentationDraws, axis: int
    ) -> tuple[Tensor, Tensor]:
        """Crop, resizing and flip along one axis as taps: index i64 and weight f32, [B, out, taps].

        A pixel on the crop's edge counts by the part of it that is inside.
        """
        made, taps = self._size[axis], self._taps[axis]
        kept = self._images.extents[rows, axis].double()
        original = self._images.originals[rows, axis].double()
        start = draws.crop[:, axis] * (kept / original)  # [B], in pixels as kept
        length = draws.crop[:, 2 + axis] * (kept / original)
        step = length / made
        # Variances add; that of a triangle goes with the square of its half width, and the first
        # one's was a pixel as kept.
        narrowed = (step.square() - 1.0).clamp(min=1.0).sqrt()
        half = torch.where(kept < original, narrowed, step.clamp(min=1.0))[:, None, None]
        device = rows.device
        at = torch.arange(made, device=device) + 0.5
        centre = start[:, None] + at * step[:, None]  # [B, out]
        first = (centre[:, :, None] - half + 0.5).floor().clamp(min=0.0)
        index = first + torch.arange(taps, device=device)  # [B, out, taps]
        weight = (1.0 - (index + 0.5 - centre[:, :, None]).abs() / half).clamp(min=0.0)
        end = (start + length)[:, None, None]
        inside = torch.minimum(index + 1.0, end) - torch.maximum(index, start[:, None, None])
        weight = weight * inside.clamp(0.0, 1.0)
        weight = weight / weight.sum(dim=2, keepdim=True)
        index = torch.minimum(index, (kept - 1.0)[:, None, None])
        flip = (draws.flip_vertically, draws.flip_horizontally)[axis][:, None, None]
        return (
            torch.where(flip, index.flip(1), index).long(),
            torch.where(flip, weight.flip(1), weight).float(),
        )


def _weighted_rows(levels: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Rows [B, 3, out, w] as sums of rows ``index`` [B, out, taps] of ``levels`` [B, 3, h, w]."""
    count, channels, height, width = levels.shape
    planes = torch.arange(count * channels, device=levels.device).view(count, channels, 1, 1)
    rows = planes * height + index[:, None]  # [B, 3, out, taps]
    weights = weight[:, None].expand_as(rows)
    taps = rows.shape[3]
    made = functional.embedding_bag(
        rows.view(-1, taps),
        levels.reshape(-1, width),
        mode="sum",
        per_sample_weights=weights.reshape(-1, taps),
    )
    return made.view(count, channels, -1, width)


def _grey_statistics(images: SideImages) -> tuple[Tensor, Tensor]:
    """Mean grey level [M] and its histogram [M, bins], as shares weighted by channel, f64."""
    weights = torch.from_numpy(GREY_WEIGHTS)
    mean = torch.empty(len(images), dtype=torch.float64)
    shares = torch.empty((len(images), _BINS), dtype=torch.float64)
    first_bin = (torch.arange(3) * _BINS)[:, None]
    centres = torch.arange(_BINS, dtype=torch.float64)
    for i, (rows, columns) in enumerate(images.extents.tolist()):
        levels = images.levels[i, :, :rows, :columns].reshape(3, -1).int()
        deep = images.full_scale != 255.0
        bins = (levels + 128) // 257 if deep else levels
        counts = torch.bincount((bins + first_bin).view(-1), minlength=3 * _BINS)
        shares[i] = weights @ counts.view(3, _BINS).double() / (rows * columns)
        mean[i] = weights @ levels.double().mean(dim=1) if deep else shares[i] @ centres
    return mean, shares
