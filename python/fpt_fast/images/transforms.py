"""Decoded image to network input: pad, resize, scale, normalise."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fpt_fast.records import Preprocessing

FULL_SCALE = {torch.uint8: 255.0, torch.uint16: 65535.0}


def to_network_input(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Resize [3, h, w] u8 or u16 to exactly ``preprocessing.size`` and normalise: [3, H, W] f32.

    Bilinear with antialiasing, the aspect ratio kept only with ``fit="pad"``; then
    ``(x / full scale - mean) / std``.  8-bit images are rounded to 8 bits after resizing, as the
    published code does by way of Pillow.  A smaller image is scaled up (plain bilinear).
    ValueError for any other tensor.
    """
    check_image(image)
    fitted = fit_image(image, preprocessing)
    resized = resize_levels(merge_grey(fitted), preprocessing.size)
    return normalise(resized, preprocessing, FULL_SCALE[image.dtype])


def check_image(image: Tensor) -> None:
    """Raise ``ValueError`` unless ``image`` is [3, h, w] of u8 or u16, h and w at least 1."""
    if image.dtype not in FULL_SCALE or image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(
            f"image must be [3, h, w] of uint8 or uint16, as read_image gives it, got "
            f"{list(image.shape)} of {image.dtype}"
        )
    if image.numel() == 0:
        raise ValueError(f"image must have at least one pixel, got {list(image.shape)}")


def fit_image(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """``image`` [3, h, w] in the shape that is resized to ``preprocessing.size``.

    With ``fit="pad"`` black is added on both sides of the edge that is too short, so that the
    shape is that of ``size`` up to a pixel; else the image itself.
    """
    if preprocessing.fit == "stretch":
        return image
    rows, columns = padded_size((image.shape[1], image.shape[2]), preprocessing.size)
    top, left = (rows - image.shape[1]) // 2, (columns - image.shape[2]) // 2
    grey = merge_grey(image)
    # Pixel by pixel in memory, like what read_image gives: the layout that resizes fastest.
    padded = torch.zeros((rows, columns, len(grey)), dtype=image.dtype).permute(2, 0, 1)
    padded[:, top : top + image.shape[1], left : left + image.shape[2]] = grey
    return padded.expand(3, -1, -1)


def padded_size(image: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) around ``image`` in the shape of ``size``, to a pixel."""
    height, width = image
    return (
        max(height, round(width * size[0] / size[1])),
        max(width, round(height * size[1] / size[0])),
    )


def size_within(image: Sequence[int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of what is no padding in an input of ``size``."""
    scale = min(size[0] / image[0], size[1] / image[1])
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))


def merge_grey(image: Tensor) -> Tensor:
    """[1, h, w] where the three channels of a grey image share memory, else ``image`` itself."""
    return image[:1] if image.stride(0) == 0 else image


def resize_levels(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [c, h, w] without scaling its levels: u8 stays u8, u16 becomes f32."""
    if image.dtype == torch.uint16:
        image = image.float()
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]


def normalise(levels: Tensor, preprocessing: Preprocessing, full_scale: float) -> Tensor:
    """``(levels / full_scale - mean) / std`` of [1 or 3, H, W] u8 or f32: [3, H, W] f32."""
    scale, shift = scale_and_shift(preprocessing.mean, preprocessing.std, full_scale)
    out = torch.empty((3, *levels.shape[1:]))
    return torch.mul(levels, scale, out=out).add_(shift)


@lru_cache(maxsize=64)
def scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], full_scale: float
) -> tuple[Tensor, Tensor]:
    """The normalisation as one multiplication and one addition, [3, 1, 1] f32 each."""
    if len(mean) != 3 or len(std) != 3 or not all(value > 0 for value in std):
        raise ValueError(
            f"normalisation needs three means and three standard deviations above 0, "
            f"got mean {mean} and std {std}"
        )
    spread = torch.tensor(std, dtype=torch.float64).view(3, 1, 1)
    centre = torch.tensor(mean, dtype=torch.float64).view(3, 1, 1)
    return (1.0 / (full_scale * spread)).float(), (-centre / spread).float()
