"""What the checks need to know of an image, from one read of its file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from fpt_fast.images import ImageError, read_item
from fpt_fast.images.parallel import ordered_map
from fpt_fast.images.transforms import merge_grey
from fpt_fast.records import ImageItem

# Cells of a thumbnail: 16 rows of 16 differences between neighbours.
THUMBNAIL = (16, 17)


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """One decoded image.

    ``digest`` is of its pixels, so that the same picture in another lossless file is the same;
    ``size`` (height, width); ``depth`` bits a sample; ``low`` and ``high`` its extreme values;
    ``thumbnail`` [16, 17] f32 in [0, 1], grey, each cell the mean of its area.
    """

    item: ImageItem
    digest: str
    size: tuple[int, int]
    depth: int
    grey: bool
    low: int
    high: int
    thumbnail: NDArray[np.float32]

    @property
    def blank(self) -> bool:
        """True where every pixel has the same value."""
        return self.low == self.high

    @property
    def labels(self) -> tuple[float, ...]:
        """The class of the image, the findings that it has, or its number."""
        if self.item.value is not None:
            return (self.item.value,)
        if self.item.findings:
            return tuple(place for place, has in enumerate(self.item.findings) if has == 1)
        return (self.item.label,)


def examine_images(
    items: Sequence[ImageItem], *, workers: int = 2
) -> tuple[list[ImageFacts], list[ImageError]]:
    """Facts of every image that can be decoded, in order, and the errors of the others."""
    facts: list[ImageFacts] = []
    errors: list[ImageError] = []
    for result in ordered_map(_facts_or_error, items, workers=workers, ahead=2 * workers):
        if isinstance(result, ImageError):
            errors.append(result)
        else:
            facts.append(result)
    return facts, errors


def _facts_or_error(item: ImageItem) -> ImageFacts | ImageError:
    try:
        return image_facts(item, read_item(item))
    except ImageError as error:
        return error


def image_facts(item: ImageItem, image: Tensor) -> ImageFacts:
    """Facts of a decoded image [3, h, w] u8 or u16."""
    levels = merge_grey(image)  # [1 or 3, h, w]
    grey = len(levels) == 1 or bool((levels == levels[:1]).all())
    kept = levels[:1] if grey else levels
    pixels = np.ascontiguousarray(kept.numpy())
    size = (image.shape[1], image.shape[2])
    digest = xxhash.xxh3_128(f"{pixels.dtype} {pixels.shape} ".encode())
    digest.update(pixels.tobytes())
    depth = 8 * pixels.dtype.itemsize
    return ImageFacts(
        item=item,
        digest=digest.hexdigest(),
        size=size,
        depth=depth,
        grey=grey,
        low=int(pixels.min()),
        high=int(pixels.max()),
        thumbnail=_thumbnail(pixels, float(2**depth - 1)),
    )


def _thumbnail(pixels: NDArray[np.generic], full_scale: float) -> NDArray[np.float32]:
    """Means over areas; an image smaller than a thumbnail gives its pixels to several cells."""
    mean = torch.from_numpy(pixels.mean(0, dtype=np.float32) / np.float32(full_scale))
    shrink = partial(torch.nn.functional.adaptive_avg_pool2d, output_size=THUMBNAIL)
    small: NDArray[np.float32] = shrink(mean[None, None])[0, 0].numpy()
    return small
