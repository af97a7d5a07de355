"""The tiers on a real device: every batch is what the cache holds, however busy the device is.

Where there is no GPU, copies go to the simulation of ``tests/tiers``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache.samples import LAYOUTS, build_cache, keys
from tiers.simulation import AtOnce

from fpt_fast.cache import CacheReader, RecordLayout
from fpt_fast.records import FeatureBatch, ImageItem, SweepBatch
from fpt_fast.tiers import CudaStreams, ReadFeatures, Staging, StoredFeatures, Streams
from on_device import DEVICE, ON_GPU

pytestmark = pytest.mark.gpu

IMAGES, BATCH = (96, 8) if ON_GPU else (11, 3)
# 2 MB a record on a GPU: copies long enough to be overtaken.
LAYOUT = RecordLayout(4, 12, 170, 64) if ON_GPU else LAYOUTS["float16"]


def open_streams() -> Streams:
    return CudaStreams(DEVICE) if ON_GPU else AtOnce()


def batches(features: Any, items: list[ImageItem], order: list[int]) -> Iterator[SweepBatch]:
    for start in range(0, len(order), BATCH):
        picked = [items[i] for i in order[start : start + BATCH]]
        kept = features(picked, [], [])
        side = torch.tensor(order[start : start + BATCH]).float()[:, None, None, None]
        side = side.expand(-1, 3, 64, 64).contiguous()
        batch = FeatureBatch(
            side,
            kept.kv,
            kept.rows,
            torch.zeros(len(picked), dtype=torch.int64),
            tuple(item.key for item in picked),
        )
        yield SweepBatch(side[None], batch)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("tier", ["resident", "pinned", "disk"])
@pytest.mark.parametrize("busy", ["work", "copies"])
def test_every_batch_is_the_cache_s(tmp_path: Path, tier: str, busy: str) -> None:
    build_cache(tmp_path / "cache", IMAGES, layout=LAYOUT)
    items = [ImageItem(key, Path(key), 0, "train") for key in keys(IMAGES)]
    load = torch.randn(4096 if ON_GPU else 8, 4096 if ON_GPU else 8, device=DEVICE)
    with CacheReader(tmp_path / "cache") as reader:
        streams = open_streams()
        staging = Staging(streams)
        features: Any
        if tier == "disk":
            features = ReadFeatures(reader, streams, batch_size=BATCH, workers=2)
        else:
            features = StoredFeatures(reader, items, streams, resident=tier == "resident")
        for epoch in range(3):
            generator = torch.Generator().manual_seed(epoch)
            order = torch.randperm(IMAGES, generator=generator).tolist()
            sums, keys_seen = [], []
            for batch in staging(map(staging.pin, batches(features, items, order))):
                # Behind a long product, the batch is read long after the caller went on.
                for _ in range(8 if busy == "work" else 0):
                    load = (load @ load).tanh()
                kv, rows = batch.shared.kv, batch.shared.rows
                assert kv is not None and kv.device.type == DEVICE.type
                picked = kv if rows is None else kv[rows.to(kv.device)]
                sums.append((picked.clone(), batch.side_pixels[0, :, 0, 0, 0].clone()))
                keys_seen += batch.shared.keys
            expected = reader.read([reader.row(key) for key in keys_seen]).kv
            assert torch.equal(torch.cat([kv for kv, _ in sums]).cpu(), expected)
            assert torch.cat([side for _, side in sums]).tolist() == order
    assert load.isfinite().all()
