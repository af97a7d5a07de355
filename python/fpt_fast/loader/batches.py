"""One split of a data set as batches, of one model or of several side by side.

Batches are made ahead by threads; what a batch holds depends only on (seed, epoch, position),
never on the number of threads.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from fpt_fast.config import AugmentConfig
from fpt_fast.images import (
    DecodedStore,
    SideAugmentation,
    SideBatches,
    SideImages,
    choose,
    fit_image,
    hashed_uniform,
    labels_of,
    mix,
    sampling_weights,
    to_network_input,
)
from fpt_fast.loader.sources import FeatureSource
from fpt_fast.loader.streams import ORDER_STREAM, SIDE_STREAM, stream_generator
from fpt_fast.profiling import span
from fpt_fast.records import (
    FeatureBatch,
    ImageItem,
    Preprocessing,
    SweepBatch,
)
from fpt_fast.tiers import Staging


class FeatureLoader:
    """One split as batches of ``FeatureBatch``; see ``set_epoch`` for what an epoch changes.

    ``side`` says how the side input is made; with ``augmentation`` it is augmented, with numbers
    that depend only on (seed, epoch, image).  The last batch may be smaller: no image is ever
    dropped.  ``shuffle`` permutes the images anew in every epoch, or with ``sampling="balanced"``
    draws as many with repeats, each class (finding, or none) alike often.  ``side_images`` are
    ``items`` shrunk beforehand (``shrink_images``, augmented or not as here); without them every
    image is decoded for its batch, unless ``store`` has it.  ``order_seed`` is that of the order
    alone, where it is not ``seed``.  ``staging`` takes the batches to a device (``tiers.Staging``).
    ``side_device``: the side images lie there, batches bring (row, seed) [B, 2] i64 for each image
    in the place of its side input, and ``side_input`` makes that of them.
    """

    def __init__(
        self,
        items: Sequence[ImageItem],
        features: FeatureSource,
        side: Preprocessing,
        *,
        batch_size: int,
        store: DecodedStore,
        augmentation: AugmentConfig | None = None,
        side_images: SideImages | None = None,
        shuffle: bool = False,
        seed: int = 0,
        order_seed: int | None = None,
        sampling: Literal["shuffled", "balanced"] = "shuffled",
        workers: int = 2,
        staging: Staging | None = None,
        side_device: torch.device | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if not items:
            raise ValueError("a loader needs at least one image, got none; is the split empty?")
        if side_images is not None and len(side_images) != len(items):
            raise ValueError(
                f"side_images must be those of the {len(items)} items, got {len(side_images)}"
            )
        self._items = tuple(items)
        self._labels = labels_of(items)
        self._weights = sampling_weights(self._labels) if sampling == "balanced" else None
        self._features = features
        self._side = side
        self._augment = None if augmentation is None else SideAugmentation(augmentation, side)
        self._side_batches = (
            None if side_images is None else SideBatches(side_images, side, augmentation)
        )
        self._side_input: Callable[[Tensor], Tensor] | None = None
        if side_device is not None:
            if self._side_batches is None:
                raise ValueError("side_device needs side_images, to be put there")
            self._side_input = _OnDevice(self._side_batches.to(side_device))
        self._batch_size = batch_size
        self._store = store
        self._shuffle = shuffle
        self._seed = seed
        self._order_seed = seed if order_seed is None else order_seed
        self._workers = max(1, workers)
        self._staging = staging
        self._epoch = 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._items) // self._batch_size)

    @property
    def items(self) -> tuple[ImageItem, ...]:
        """The images, in the order they have without shuffling."""
        return self._items

    @property
    def side_input(self) -> Callable[[Tensor], Tensor] | None:
        """Makes the side input [B, 3, h, w] of what batches bring in its place, where they do; to
        be called on the device, within the training step."""
        return self._side_input

    @property
    def side_bytes(self) -> int:
        """Memory of the stored side images."""
        return 0 if self._side_batches is None else self._side_batches.nbytes

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and the augmentation of ``epoch``: the same epoch is always the same."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[FeatureBatch]:
        """Batches of the current epoch, made up to ``workers + 1`` ahead."""
        return self.iterate_from(0)

    def iterate_from(self, step: int) -> Iterator[FeatureBatch]:
        """Batches of the current epoch from ``step`` on; those before are not made."""
        for batch in self.iterate_seeds((self._seed,), step):
            yield batch.shared

    def iterate_shares(
        self, rows_of: Callable[[int], range], step: int
    ) -> Iterator[tuple[int, FeatureBatch]]:
        """Of each batch of the current epoch from ``step`` on the number of its images, and those
        of its rows that ``rows_of`` this number picks; the others are not made."""
        chunks = self._chunks(step)
        parts = [[chunk[row] for row in rows_of(len(chunk))] for chunk in chunks]
        for chunk, made in zip(chunks, self._iterate(parts, (self._seed,)), strict=True):
            yield len(chunk), made.shared

    def iterate_seeds(self, seeds: Sequence[int], step: int = 0) -> Iterator[SweepBatch]:
        """Batches of the current epoch from ``step`` on, for several models: a side input for each
        of ``seeds``, the one that this loader makes with that seed, and everything else once."""
        return self._iterate(self._chunks(step), seeds)

    def _chunks(self, step: int) -> list[list[int]]:
        """Positions of the images of each batch from ``step`` on."""
        order = self._order(self._epoch)
        return [
            order[start : start + self._batch_size]
            for start in range(step * self._batch_size, len(order), self._batch_size)
        ]

    def _iterate(self, chunks: list[list[int]], seeds: Sequence[int]) -> Iterator[SweepBatch]:
        epoch = self._epoch
        # The maker of a batch announces that which comes after those being made beside it.
        coming = [*chunks[self._workers :], *([[]] * self._workers)]
        made = _ahead(
            list(zip(chunks, coming, strict=False)),
            lambda chunk: self._make(*chunk, epoch, seeds),
            self._workers,
        )
        return made if self._staging is None else self._staging(made)

    def _order(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._items)))
        generator = stream_generator(mix(self._order_seed, epoch), ORDER_STREAM)
        if self._weights is not None:
            drawn = torch.multinomial(
                self._weights, len(self._items), replacement=True, generator=generator
            )
        else:
            drawn = torch.randperm(len(self._items), generator=generator)
        order: list[int] = drawn.tolist()
        return order

    def _make(
        self, positions: Sequence[int], coming: Sequence[int], epoch: int, seeds: Sequence[int]
    ) -> SweepBatch:
        items = [self._items[position] for position in positions]
        self._features.announce([*items, *(self._items[position] for position in coming)])
        rows = torch.tensor(positions, dtype=torch.int64)
        images: list[Tensor] = []
        image_seeds: list[int] = []
        if self._features.needs_images or self._side_batches is None:
            images = [self._store.get(item) for item in items]
        if self._features.needs_images:
            image_seeds = [mix(self._seed, epoch, position) for position in positions]
        with span("augment"):
            # Without augmentation the seed changes nothing.
            different = seeds[:1] if self._augment is None else seeds
            sides = [
                self._make_side(rows, images, mix(seed, epoch, SIDE_STREAM)) for seed in different
            ]
        features = self._features(items, images, image_seeds)
        side_pixels = sides[0].unsqueeze(0) if len(sides) == 1 else torch.stack(sides)
        batch = SweepBatch(
            side_pixels=side_pixels.expand(len(seeds), *sides[0].shape),
            shared=FeatureBatch(
                side_pixels=sides[0],
                kv=None if features is None else features.kv,
                rows=None if features is None else features.rows,
                labels=self._labels[rows],  # [B], of findings [B, findings]
                keys=tuple(item.key for item in items),
                k_scales=None if features is None else features.k_scales,
                v_scales=None if features is None else features.v_scales,
            ),
        )
        return batch if self._staging is None else self._staging.pin(batch)

    def _make_side(self, rows: Tensor, images: Sequence[Tensor], seed: int) -> Tensor:
        """Side input [B, 3, h, w]; both ways make the same choices for the same image."""
        if self._side_input is not None:
            return torch.stack((rows, torch.full_like(rows, seed)), dim=1)
        if self._side_batches is not None:
            return self._side_batches(rows, seed)
        if self._augment is None:
            return torch.stack([to_network_input(image, self._side) for image in images])
        fitted = [fit_image(image, self._side) for image in images]
        heights, widths = torch.tensor([image.shape[1:] for image in fitted]).unbind(1)
        uniform, config = hashed_uniform(seed, rows), self._augment.config
        draws = choose(uniform, heights, widths, config, self._side.size)
        return torch.stack(
            [self._augment.apply(image, draws.of(i)) for i, image in enumerate(fitted)]
        )


class _OnDevice:
    """The side input of (row, seed) pairs [B, 2] i64."""

    def __init__(self, batches: SideBatches) -> None:
        self._batches = batches

    def __call__(self, pairs: Tensor) -> Tensor:
        return self._batches(pairs[:, 0], pairs[:, 1])


class SweepLoader:
    """The batches of ``loader`` for several models: one side input for each of ``seeds``."""

    def __init__(self, loader: FeatureLoader, seeds: Sequence[int]) -> None:
        self._loader = loader
        self._seeds = tuple(seeds)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._loader)

    def set_epoch(self, epoch: int) -> None:
        """As ``FeatureLoader.set_epoch``."""
        self._loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[SweepBatch]:
        """Batches of the current epoch."""
        return self._loader.iterate_seeds(self._seeds)


def _ahead(
    chunks: Sequence[tuple[Sequence[int], Sequence[int]]],
    make: Callable[[tuple[Sequence[int], Sequence[int]]], SweepBatch],
    workers: int,
) -> Iterator[SweepBatch]:
    """Make batches by threads, in order, never more than ``workers + 1`` unclaimed."""
    waiting = deque(chunks)
    running: deque[Future[SweepBatch]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fpt-loader")
    try:
        while waiting or running:
            while waiting and len(running) <= workers:
                running.append(pool.submit(make, waiting.popleft()))
            yield running.popleft().result()
    finally:
        # An epoch that is left early must not go on decoding.
        pool.shutdown(wait=True, cancel_futures=True)
