"""Twenty shuffled epochs over a cache larger than the memory that the process may take.

The limit is the kernel's (``RLIMIT_DATA``, what a process may allocate): the cache is larger than
what is left of it in the short form, and larger than all of it, interpreter and torch included, in
the long one.  Each batch is compared with what was written, and some are trained on; memory,
threads and descriptors stay flat after the first epochs.  A part of the cache, at most the share
that is the reader's default, may stay in the page cache; the rest is read past it.
"""

import resource
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cache.samples import FINGERPRINT, keys
from reliability.disk import open_descriptors
from reliability.subjects import Broken, rows_of

from fpt_fast.cache import CacheReader, CacheWriter, RecordLayout
from fpt_fast.images import DecodedStore, SideImages
from fpt_fast.loader import CachedFeatures, FeatureLoader
from fpt_fast.ops import prompt_attention, quantise_kv
from fpt_fast.records import FeatureBatch, ImageItem, Preprocessing, SelectedTokens

MIB = 2**20
EPOCHS, WARM = 20, 4  # after WARM of them nothing may grow any more
BATCH, DIFFERENT = 4, 7
GROWTH = 56 * MIB  # that the process may allocate beyond what it has when the soak begins
SLACK = 16 * MIB  # batches on their way or to be used again, by how the threads run, and no more
STEP_EVERY = 8  # every so-many-th batch is trained on
SIDE = Preprocessing((4, 4), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def soak(dtype: str, root: Path, megabytes: int) -> dict[str, int]:
    """Read a cache of so many MiB for ``EPOCHS`` epochs; sizes in bytes."""
    layout = RecordLayout(layers=2, heads=4, kept=125, head_width=64, dtype=dtype)
    samples = _samples(layout)
    path = _build(root / "soaked", layout, samples, megabytes * MIB // layout.record_bytes)
    size = sum(file.stat().st_size for file in path.iterdir())
    counts: Counter[str] = Counter()
    with CacheReader(path, memory_share=0) as reader:  # once before the limit
        _epochs(reader, samples, counts, 1)
    counts.clear()
    with _limited() as limit:
        share = min(0.5, size / 2 / limit)
        with CacheReader(path, memory_share=share) as reader:
            if reader.mode != "pread":
                raise Broken(f"a cache of {size} bytes is mapped for a share of {share}")
            grown = _epochs(reader, samples, counts, EPOCHS)
    shutil.rmtree(path)
    if grown > SLACK:
        raise Broken(f"memory grew by {grown} bytes after epoch {WARM}")
    return {
        **counts,
        "cache bytes": size,
        "limit bytes": limit,
        "limit bytes beyond the start": GROWTH,
        "growth bytes after the first epochs": grown,
    }


def _samples(layout: RecordLayout) -> SelectedTokens:
    """``DIFFERENT`` records, which repeat through the cache."""
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(DIFFERENT, *layout.kv_shape, generator=generator).half()
    index = torch.arange(layout.kept, dtype=torch.int32).expand(DIFFERENT, *layout.index_shape)
    index = index + torch.arange(DIFFERENT, dtype=torch.int32).view(-1, 1, 1, 1)
    if not layout.has_scales:
        return SelectedTokens(kv, index)
    kv8, k_scales, v_scales = quantise_kv(kv, getattr(torch, layout.dtype))
    return SelectedTokens(kv8, index, k_scales, v_scales)


def _build(path: Path, layout: RecordLayout, samples: SelectedTokens, records: int) -> Path:
    writing = CacheWriter(
        path, layout, FINGERPRINT, keys(records), records_per_shard=records // 3 + 1, sync_every=64
    )
    with writing as writer:
        for first in range(0, records, DIFFERENT):
            count = min(DIFFERENT, records - first)
            writer.write(range(first, first + count), rows_of(samples, 0, count))
        writer.finish()
    return path


@contextmanager
def _limited() -> Iterator[int]:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _status("VmData") + GROWTH
    resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield limit
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise Broken(f"this kernel does not tell {name}")


def _epochs(reader: CacheReader, samples: SelectedTokens, counts: Counter[str], epochs: int) -> int:
    """Read so many epochs; bytes by which the last ones took more than the first ``WARM``."""
    items = [ImageItem(key, Path(key), 0, "train") for key in reader.keys]
    black = torch.zeros(len(items), 3, 4, 4, dtype=torch.uint8)
    sizes = torch.full((len(items), 2), 4)
    loader = FeatureLoader(
        items,
        CachedFeatures(reader, items),
        SIDE,
        batch_size=BATCH,
        store=DecodedStore(),
        side_images=SideImages(black, sizes, sizes),
        shuffle=True,
    )
    layout = reader.layout
    q = torch.randn(layout.layers, layout.heads, 4, layout.head_width, requires_grad=True)
    resident, beside = [], set[tuple[int, int]]()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        peak = 0
        for number, batch in enumerate(loader):
            _compare(reader, batch, samples)
            if number % STEP_EVERY == 0:
                _step(q, batch)
            peak = max(peak, _status("VmRSS"))
            counts["records"] += len(batch.keys)
            counts["bytes read"] += len(batch.keys) * layout.record_bytes
        resident.append(peak)
        if epoch >= min(1, epochs - 1):
            beside.add((threading.active_count(), open_descriptors()))
    if len(beside) > 1:
        raise Broken(f"threads and descriptors after epochs: {sorted(beside)}")
    counts["epochs"] += epochs
    return max(0, max(resident[WARM:], default=0) - max(resident[:WARM]))


def _compare(reader: CacheReader, batch: FeatureBatch, samples: SelectedTokens) -> None:
    numbers = [reader.row(key) % DIFFERENT for key in batch.keys]
    for name in ("kv", "k_scales", "v_scales"):
        found, written = getattr(batch, name), getattr(samples, name)
        if (found is None) != (written is None):
            raise Broken(f"{name} are in the batch or in the cache, and not in both")
        # By bytes, since torch does not compare float8.
        if found is not None and not torch.equal(
            found.contiguous().view(torch.uint8), written[numbers].view(torch.uint8)
        ):
            raise Broken(f"wrong {name} came for some of {batch.keys}")


def _step(q: torch.Tensor, batch: FeatureBatch) -> None:
    """Forward and backward of what trains on a batch."""
    assert batch.kv is not None
    scales = None
    if batch.k_scales is not None and batch.v_scales is not None:
        scales = (batch.k_scales, batch.v_scales)
    q.grad = None
    prompt_attention(q, batch.kv, batch.rows, scales).square().sum().backward()
    if q.grad is None or not bool(torch.isfinite(q.grad).all()):
        raise Broken("a step over the batch gave no finite gradient")
