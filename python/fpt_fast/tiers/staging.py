"""Batches on their way to a device, a batch ahead of the work: two slots that take turns.

While the model works on one slot, the next batch is copied into the other.  A slot is overwritten
only after the work that read it, work begins only after its copies, and host memory is let go only
after the copies from it.  Nothing waits on the host, unless it is many batches ahead.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fpt_fast.cache import BufferPool
from fpt_fast.profiling import span
from fpt_fast.records import FeatureBatch, SweepBatch
from fpt_fast.tiers.choice import STAGED_BATCHES
from fpt_fast.tiers.streams import Mark, Streams

# Side inputs in pinned memory that wait to be used again.
_SIDE_BUFFERS = 12


@dataclass(slots=True)
class _Slot:
    """Device memory of one batch, by what it holds; ``used`` is the point after its last use."""

    memory: dict[str, Tensor] = field(default_factory=dict)
    used: Mark | None = None

    def room(self, streams: Streams, name: str, like: Tensor, images: int, axis: int) -> Tensor:
        """Memory for a tensor like ``like`` with ``images`` along ``axis``; grows as needed."""
        shape = (*like.shape[:axis], images, *like.shape[axis + 1 :])
        count = int(torch.Size(shape).numel())
        flat = self.memory.get(name)
        if flat is None or flat.dtype != like.dtype or flat.numel() < count:
            flat = self.memory[name] = streams.empty((count,), like.dtype)
        return flat[:count].view(shape)


class Staging:
    """Moves batches to the device of ``streams``; of what is there already nothing is moved.

    One iteration at a time: a new one ends the one before, whose slots it takes.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._slots = [_Slot() for _ in range(STAGED_BATCHES)]
        # Host tensors with the point after which nobody reads them any more.
        self._in_flight: deque[tuple[Mark, SweepBatch]] = deque()
        self._side = BufferPool(_SIDE_BUFFERS, streams.pinned)
        self._side_bytes = 0
        self._turn = 0
        self._iteration = 0

    @property
    def device_bytes(self) -> int:
        """Device memory of the slots, so far."""
        return sum(part.nbytes for slot in self._slots for part in slot.memory.values())

    def pin(self, batch: SweepBatch) -> SweepBatch:
        """The batch with its side input in pinned memory; called by the threads that make it."""
        if self._streams.holds(batch.side_pixels) or not batch.side_pixels.is_floating_point():
            return batch
        distinct = _distinct(batch.side_pixels)
        # All of one size: the last batch of an epoch must not cost a buffer of its own.
        self._side_bytes = max(self._side_bytes, distinct.nbytes)
        lease = torch.from_numpy(self._side.take(self._side_bytes))
        pinned = lease[: distinct.nbytes].view(distinct.dtype).view(distinct.shape)
        pinned.copy_(distinct)
        side = pinned.expand(batch.side_pixels.shape)
        return SweepBatch(side, replace(batch.shared, side_pixels=side[0]))

    def __call__(self, batches: Iterator[SweepBatch]) -> Iterator[SweepBatch]:
        """The same batches on the device; one is valid until the next one is asked for.

        Labels, rows and keys stay on the host, where looking at them costs nothing; they are small.
        """
        self._iteration += 1
        iteration = self._iteration
        ready: tuple[SweepBatch, _Slot, Mark] | None = None
        try:
            for batch in batches:
                self._check(iteration)
                coming = self._copy(batch)
                if ready is not None:
                    yield from self._hand_over(*ready)
                ready = coming
            if ready is not None:
                self._check(iteration)
                yield from self._hand_over(*ready)
        finally:
            # A batch that nobody took may still be on its way into memory that is given back.
            self._streams.hold_work(self._streams.copied())

    def _check(self, iteration: int) -> None:
        if iteration != self._iteration:
            raise RuntimeError(
                "these batches were staged before another iteration began, which has taken their "
                "memory; go through one after the other, or give each loader its own Staging"
            )

    def _hand_over(self, batch: SweepBatch, slot: _Slot, copied: Mark) -> Iterator[SweepBatch]:
        self._streams.hold_work(copied)
        try:
            yield batch
        finally:
            slot.used = self._streams.used()

    def _copy(self, batch: SweepBatch) -> tuple[SweepBatch, _Slot, Mark]:
        slot = self._slots[self._turn % STAGED_BATCHES]
        self._turn += 1
        if slot.used is not None:
            self._streams.hold_copies(slot.used)
        with span("copy"):
            shared = self._copy_features(batch.shared, slot)
            side = self._copy_side(batch.side_pixels, slot)
        copied = self._streams.copied()
        self._in_flight.append((copied, batch))
        while self._in_flight and (
            self._in_flight[0][0].query() or len(self._in_flight) > STAGED_BATCHES
        ):
            self._in_flight[0][0].synchronize()
            self._in_flight.popleft()
        return SweepBatch(side, replace(shared, side_pixels=side[0])), slot, copied

    def _copy_side(self, pixels: Tensor, slot: _Slot) -> Tensor:
        """[seeds, B, 3, h, w]; one that stands for all seeds is copied once."""
        if self._streams.holds(pixels) or not pixels.is_floating_point():
            return pixels
        distinct = _distinct(pixels)
        target = slot.room(self._streams, "side_pixels", distinct, distinct.shape[1], axis=1)
        self._streams.copy(target, distinct)
        return target.expand(pixels.shape)

    def _copy_features(self, batch: FeatureBatch, slot: _Slot) -> FeatureBatch:
        if batch.kv is None or self._streams.holds(batch.kv):
            return batch
        rows = None if batch.rows is None else batch.rows.tolist()

        def copied(name: str, source: Tensor) -> Tensor:
            images = len(source) if rows is None else len(rows)
            target = slot.room(self._streams, name, source, images, axis=0)
            if rows is None:
                self._streams.copy(target, source)
            else:
                # Record by record out of a store: no copy on the host first.
                for image, row in enumerate(rows):
                    self._streams.copy(target[image], source[row])
            return target

        return replace(
            batch,
            kv=copied("kv", batch.kv),
            rows=None,
            k_scales=None if batch.k_scales is None else copied("k_scales", batch.k_scales),
            v_scales=None if batch.v_scales is None else copied("v_scales", batch.v_scales),
        )


def _distinct(pixels: Tensor) -> Tensor:
    """Of side inputs [seeds, B, 3, h, w], those that are not the same memory again."""
    return pixels[:1] if pixels.stride(0) == 0 else pixels
