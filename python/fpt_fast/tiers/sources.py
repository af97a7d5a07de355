"""The features of a split by tier, as sources for ``loader.FeatureLoader``."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fpt_fast.cache import BufferPool, CacheReader, allocate_tokens, token_bytes
from fpt_fast.profiling import span
from fpt_fast.records import ImageItem, KeptFeatures, SelectedTokens
from fpt_fast.tiers.choice import STAGED_BATCHES
from fpt_fast.tiers.streams import Mark, Streams

# Records read at a time while a store is filled.
_FILLED_AT_ONCE = 32
_PARTS = ("kv", "k_scales", "v_scales")


class StoredFeatures:
    """All records of ``items`` in one store, on the device (``resident``) or in pinned memory of
    the host; filled at once, each record checked.  A batch points into it by ``rows``."""

    needs_images = False

    def __init__(
        self, reader: CacheReader, items: Sequence[ImageItem], streams: Streams, *, resident: bool
    ) -> None:
        self._row_of = {item.key: row for row, item in enumerate(items)}
        rows = [reader.row(item.key) for item in items]
        fill = _fill_device if resident else _fill_host
        self._store = fill(reader, rows, streams)

    @property
    def store_bytes(self) -> int:
        """Memory of the store."""
        return sum(part.nbytes for part in _parts(self._store).values())

    def __call__(
        self, items: Sequence[ImageItem], images: Sequence[Tensor], seeds: Sequence[int]
    ) -> KeptFeatures:
        """Where the records of ``items`` are; nothing is read."""
        rows = torch.tensor([self._row_of[item.key] for item in items], dtype=torch.int64)
        store = self._store
        return KeptFeatures(store.kv, rows, store.k_scales, store.v_scales)

    def announce(self, items: Sequence[ImageItem]) -> None:
        """Nothing to do ahead: all is there."""


class ReadFeatures:
    """Records read from the disk for each batch of ``batch_size`` at the most into pinned memory,
    which is used again once a batch is gone; ``workers`` threads read at a time."""

    needs_images = False

    def __init__(
        self, reader: CacheReader, streams: Streams, *, batch_size: int, workers: int
    ) -> None:
        self._reader = reader
        self._buffer_bytes = token_bytes(reader.layout, batch_size)
        self._buffers = BufferPool(workers + 2 + STAGED_BATCHES, streams.pinned)

    def __call__(
        self, items: Sequence[ImageItem], images: Sequence[Tensor], seeds: Sequence[int]
    ) -> KeptFeatures:
        """Read and check the records of ``items``."""
        with span("read"):
            # All of one size: the last batch of an epoch must not cost a buffer of its own.
            buffer = self._buffers.take(self._buffer_bytes)
            tokens = allocate_tokens(self._reader.layout, len(items), buffer)
            self._reader.read([self._reader.row(item.key) for item in items], out=tokens)
        return KeptFeatures(tokens.kv, None, tokens.k_scales, tokens.v_scales)

    def announce(self, items: Sequence[ImageItem]) -> None:
        """Have the disk work ahead."""
        self._reader.announce([self._reader.row(item.key) for item in items])


def record_bytes(reader: CacheReader) -> int:
    """Bytes of one image's keys, values and scales."""
    return sum(part.bytes for part in reader.layout.parts if part.name in _PARTS)


def free_host_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory of the host that is free now, caches of files counted as free; where the system does
    not say so, all of it."""
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _fill_host(reader: CacheReader, rows: Sequence[int], streams: Streams) -> SelectedTokens:
    """Records read straight into their places in pinned memory."""
    layout = reader.layout
    sizes = {part.name: len(rows) * part.bytes for part in layout.parts if part.name in _PARTS}
    store = {
        part.name: torch.from_numpy(streams.pinned(sizes[part.name]))
        .view(getattr(torch, part.dtype))
        .view(len(rows), *part.shape)
        for part in layout.parts
        if part.name in sizes
    }
    index = allocate_tokens(layout, _FILLED_AT_ONCE).index
    for part in _chunks(len(rows)):
        pieces = {name: tensor[part] for name, tensor in store.items()}
        out = SelectedTokens(**pieces, index=index[: part.stop - part.start])
        reader.read(rows[part], out=out)
    return SelectedTokens(**store, index=index)


def _fill_device(reader: CacheReader, rows: Sequence[int], streams: Streams) -> SelectedTokens:
    """One chunk is read while the one before it is on its way."""
    layout = reader.layout
    store = {
        part.name: streams.empty((len(rows), *part.shape), getattr(torch, part.dtype))
        for part in layout.parts
        if part.name in _PARTS
    }
    size = token_bytes(layout, min(_FILLED_AT_ONCE, len(rows)))
    buffers = [streams.pinned(size) for _ in range(2)]
    busy: list[Mark | None] = [None, None]
    for turn, part in enumerate(_chunks(len(rows))):
        mark = busy[turn % 2]
        if mark is not None:
            mark.synchronize()
        tokens = allocate_tokens(layout, part.stop - part.start, buffers[turn % 2])
        reader.read(rows[part], out=tokens)
        for name, target in store.items():
            streams.copy(target[part], getattr(tokens, name))
        busy[turn % 2] = streams.copied()
    last = streams.copied()
    last.synchronize()
    streams.hold_work(last)
    return SelectedTokens(**store, index=torch.empty(0, dtype=torch.int32))


def _chunks(count: int) -> list[slice]:
    return [
        slice(start, min(start + _FILLED_AT_ONCE, count))
        for start in range(0, count, _FILLED_AT_ONCE)
    ]


def _parts(store: SelectedTokens) -> dict[str, Tensor]:
    tensors = {name: getattr(store, name) for name in _PARTS}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
