"""Batches of an epoch, without a model: ours beside ``torch.utils.data`` with 0, 1 and 2 workers.

Both read features and decode, augment and stack side images in every epoch; ours has shrunk its
side images beforehand, as ``fpt-fast train`` does (``shrink_seconds``, once a run), and threads
instead of processes.  ``--full``: 160 JPEGs of 1024 px, features as of ViT-B at 512 px.
"""

import time
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch.utils.data import DataLoader

from benchmarks.bench_epoch import BATCH, make_loader, prepare
from benchmarks.beside import alternate
from benchmarks.counts import Count
from benchmarks.plain.epoch import PlainDataset
from fpt_fast.images import shrink_images

FULL_IMAGES = 160


@pytest.mark.parametrize("workers", [0, 1, 2])
def bench_loader(benchmark: BenchmarkFixture, tmp_path: Path, full: bool, workers: int) -> None:
    """``workers`` are those of the plain twin."""
    setting = prepare(tmp_path, full, FULL_IMAGES if full else None)
    start = time.perf_counter()
    side_images = shrink_images(setting.items, setting.side, augmented=True)
    shrink_seconds = time.perf_counter() - start
    loader = make_loader(setting, side_images, "epoch")
    dataset = PlainDataset(
        [item.path for item in setting.items],
        setting.plain_features,
        [item.label for item in setting.items],
        setting.side.size,
    )

    def ours() -> int:
        return sum(len(batch.labels) for batch in loader)

    def plain() -> int:
        batches = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=workers)
        return sum(len(labels) for _, _, _, labels in batches)

    count = len(setting.items)
    seen = alternate(
        benchmark,
        ours,
        plain,
        dtype="float32",
        count=Count(flops=0, bytes=count * setting.reader.layout.record_bytes),
        rounds=3,
        is_long=True,
    )
    setting.reader.close()
    assert seen == plain() == count
    benchmark.group = "loader"
    benchmark.extra_info |= {"plain_workers": workers, "images": count}
    benchmark.extra_info["shrink_seconds"] = shrink_seconds
