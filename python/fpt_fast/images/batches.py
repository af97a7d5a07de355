"""Ordered batches of network inputs for preloading, decoded ahead in threads."""

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from itertools import groupby

import torch
from torch import Tensor

from fpt_fast.images.decode import read_item
from fpt_fast.images.parallel import ordered_map
from fpt_fast.images.transforms import to_network_input
from fpt_fast.records import ImageBatch, ImageItem, Preprocessing


def iter_image_batches(
    items: Sequence[ImageItem],
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int = 2,
    skip_positions: Collection[int] = (),
) -> Iterator[tuple[list[int], ImageBatch]]:
    """Yield (positions in ``items``, batch) with pixels [B, 3, H, W] f32, in order.

    Batches lie on a fixed grid: one holds the positions from ``i * batch_size`` up to
    ``(i + 1) * batch_size`` that are not skipped; a batch with none left is left out.  While the
    caller works on one batch the next is decoded; no more than that is held.

    Raises ``ImageError``, with path and key, at the turn of an image that cannot be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    skipped = frozenset(skip_positions)
    positions = [position for position in range(len(items)) if position not in skipped]

    def load(position: int) -> Tensor:
        return to_network_input(read_item(items[position]), preprocessing)

    inputs = ordered_map(load, positions, workers=workers, ahead=batch_size + workers)
    return _group(items, positions, inputs, batch_size)


def _group(
    items: Sequence[ImageItem],
    positions: list[int],
    inputs: Generator[Tensor, None, None],
    batch_size: int,
) -> Iterator[tuple[list[int], ImageBatch]]:
    # A caller that stops early must not leave threads decoding.
    with closing(inputs):
        for _, group in groupby(positions, key=lambda position: position // batch_size):
            batch = list(group)
            pixels = torch.stack([next(inputs) for _ in batch])  # [B, 3, H, W]
            yield batch, ImageBatch(pixels, tuple(items[position].key for position in batch))
