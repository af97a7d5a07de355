"""Mean and standard deviation of a data set's pixels, and the search for unreadable images."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from fpt_fast.distributed import ALONE, World
from fpt_fast.images.decode import ImageError, read_item
from fpt_fast.images.parallel import ordered_map
from fpt_fast.images.transforms import FULL_SCALE, merge_grey, resize_levels, size_within
from fpt_fast.records import Fit, ImageItem

_LISTED = 20

Channels = tuple[float, float, float]
_Moments = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]


def check_images(
    items: Sequence[ImageItem],
    *,
    workers: int = 2,
    on_done: Callable[[int], None] | None = None,
) -> list[ImageError]:
    """Decode every image in ``workers`` threads; return what cannot be read, sorted by key.

    ``on_done`` is called with the number of images looked at so far.
    """
    errors = []
    found = ordered_map(_try_to_read, items, workers=workers, ahead=4 * workers)
    for done, error in enumerate(found, start=1):
        if error is not None:
            errors.append(error)
        if on_done is not None:
            on_done(done)
    return sorted(errors, key=lambda error: error.key)


def format_unreadable(errors: Sequence[ImageError]) -> str:
    """One message that names the unreadable images with their reasons, 20 at most, and counts."""
    noun = "image" if len(errors) == 1 else "images"
    lines = [f"{len(errors)} {noun} cannot be read:"]
    lines += [f"  {error.key}: {error.reason}" for error in errors[:_LISTED]]
    if len(errors) > _LISTED:
        lines.append(f"  ... and {len(errors) - _LISTED} more")
    return "\n".join(lines)


def measure_statistics(
    items: Sequence[ImageItem],
    *,
    size: tuple[int, int],
    fit: Fit = "stretch",
    workers: int = 2,
    world: World = ALONE,
) -> tuple[Channels, Channels]:
    """Mean and standard deviation per channel, of values in [0, 1], at ``size`` (height, width).

    With ``fit="pad"`` each image counts as large as it is within ``size``; padding does not count.

    Both are over all pixels of all images after resizing: the mean of the images' means, and the
    root of the mean squared deviation from it.  f64, and bit-equal for any number of workers and
    of ranks, which share the images.

    Raises ``ImageError`` for an unreadable image, ValueError where there are no images or a
    channel has one value only.
    """
    if not items:
        raise ValueError("mean and std need at least one image, got none")
    mine = world.share(len(items))
    measured = ordered_map(
        lambda item: _image_moments(item, size, fit),
        items[mine.start : mine.stop],
        workers=workers,
        ahead=4 * workers,
    )
    part = torch.zeros((len(mine), 2, 3), dtype=torch.float64)
    for row, moments in enumerate(measured):
        part[row] = torch.from_numpy(np.stack(moments))
    whole = world.gather_shares(part, len(items), "measuring the images").numpy()
    means, variances = np.ascontiguousarray(whole.swapaxes(0, 1))  # [images, 3] each
    mean = means.mean(axis=0)
    std = np.sqrt((variances + (means - mean) ** 2).mean(axis=0))
    if not (std > 0.0).all():
        raise ValueError(
            f"all pixels of a channel have one value (std {tuple(std.tolist())}); "
            "give mean and std instead of measuring them"
        )
    return _as_channels(mean), _as_channels(std)


def _try_to_read(item: ImageItem) -> ImageError | None:
    try:
        read_item(item)
    except ImageError as error:
        return error
    return None


def _image_moments(item: ImageItem, size: tuple[int, int], fit: Fit) -> _Moments:
    """Mean and variance of each channel of one image, [3] f64 both."""
    image = read_item(item)
    if fit == "pad":
        size = size_within(image.shape[1:], size)
    levels = resize_levels(merge_grey(image), size).numpy().astype(np.float64)
    levels /= FULL_SCALE[image.dtype]
    mean, variance = levels.mean(axis=(1, 2)), levels.var(axis=(1, 2))
    return np.broadcast_to(mean, 3), np.broadcast_to(variance, 3)


def _as_channels(values: npt.NDArray[np.float64]) -> Channels:
    return float(values[0]), float(values[1]), float(values[2])
