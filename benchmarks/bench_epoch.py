"""One epoch of training, everything included, against the plain one that decodes every image.

``--full``: 600 JPEGs of 1024 px made here, features as of ViT-B at 512 px (6.8 GB of disk for
both), FPT+, batch 16.  ``epoch`` is all of it; ``steps`` leaves the side images out on both sides
and keeps the reading of features.  Shrinking the side images, done once a run, is measured
beside it: ``ratio_over_20_epochs`` counts it in.
"""

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.bench_training_step import (
    PRECISIONS,
    method_config,
    optimizer_of,
    plain_model,
    spec,
    step_flops,
)
from benchmarks.beside import alternate
from benchmarks.counts import Count
from benchmarks.plain.epoch import PlainDataset, plain_epoch, write_features
from fpt_fast.cache import CacheReader, CacheWriter, RecordLayout
from fpt_fast.config import AugmentConfig, Precision, TrainConfig
from fpt_fast.images import DecodedStore, SideImages, load_image_set, shrink_images
from fpt_fast.loader import CachedFeatures, FeatureLoader
from fpt_fast.model import FptModel, create_model
from fpt_fast.records import ImageItem, Preprocessing, SelectedTokens
from fpt_fast.trainer import fit

CLASSES = 5
BATCH = 16
EPOCHS = 20


@dataclass(frozen=True)
class Setting:
    """Data on disk in both forms."""

    items: tuple[ImageItem, ...]
    reader: CacheReader
    plain_features: list[Path]
    side: Preprocessing
    model: FptModel


def write_images(folder: Path, count: int, edge: int) -> tuple[ImageItem, ...]:
    """JPEGs with smooth shapes and grain, in ``CLASSES`` classes."""
    rng = np.random.default_rng(0)
    grain = rng.integers(-12, 13, (2 * edge, 2 * edge, 1))
    for i in range(count):
        coarse = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
        smooth = Image.fromarray(coarse).resize((edge, edge), Image.Resampling.BICUBIC)
        top, left = rng.integers(0, edge, 2)
        pixels = np.asarray(smooth) + grain[top : top + edge, left : left + edge]
        path = folder / "train" / str(i % CLASSES) / f"{i:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return load_image_set(folder, ratios=(1.0, 0.0, 0.0)).of_split("train")


def prepare(folder: Path, full: bool, count: int | None = None) -> Setting:
    count = count or (600 if full else 20)
    items = write_images(folder / "images", count, 1024 if full else 96)
    model = create_model(method_config("fpt_plus", full), backbone=spec(full), num_classes=CLASSES)
    layout = RecordLayout(
        len(model.layers), model.spec.num_heads, 205 if full else 9, model.spec.head_width
    )
    base = torch.randn(layout.kv_shape).half()
    index = torch.zeros((1, *layout.index_shape), dtype=torch.int32)
    files = []
    keys = [item.key for item in items]
    with CacheWriter(folder / "cache", layout, {}, keys, sync_every=64) as writer:
        for i in range(len(items)):
            kv = base.roll(i, dims=3)
            writer.write([i], SelectedTokens(kv[None], index))
            files.append(folder / f"{i:04d}.safetensors")
            write_features(files[-1], kv)
        writer.finish()
    os.sync()  # else the files are still being written to the disk while epochs are timed
    side = Preprocessing(model.config.side_size, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Setting(items, CacheReader(folder / "cache"), files, side, model)


def make_loader(setting: Setting, side_images: SideImages, part: str) -> FeatureLoader:
    """What ``fpt-fast train`` makes once a run."""
    return FeatureLoader(
        setting.items,
        CachedFeatures(setting.reader, setting.items, in_place=True),
        setting.side,
        batch_size=BATCH,
        store=DecodedStore(0),
        augmentation=AugmentConfig() if part == "epoch" else None,
        side_images=side_images,
        shuffle=True,
    )


def our_epoch(
    setting: Setting, loader: FeatureLoader, runs: Path, precision: Precision = "float32"
) -> float:
    """An epoch as ``fpt-fast train`` makes it, its checkpoint included; returns the mean loss."""
    history = fit(
        setting.model,
        loader,
        None,
        TrainConfig(epochs=1, batch_size=BATCH, precision=precision),
        run_dir=runs / str(time.monotonic_ns()),
        num_classes=CLASSES,
        progress=False,
        device="cpu",
    )
    return history.epochs[0].loss


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("part", ["epoch", "steps"])
def bench_epoch(
    benchmark: Any, tmp_path: Path, full: bool, part: str, precision: Precision
) -> None:
    torch.manual_seed(0)
    setting = prepare(tmp_path, full)
    start = time.perf_counter()
    side_images = shrink_images(setting.items, setting.side, augmented=part == "epoch")
    loader = make_loader(setting, side_images, part)
    shrink_seconds = time.perf_counter() - start

    plain = plain_model(setting.model).train()
    optimizer = optimizer_of(plain)
    fixed = torch.zeros(3, *setting.side.size) if part == "steps" else None
    dataset = PlainDataset(
        [item.path for item in setting.items],
        setting.plain_features,
        [item.label for item in setting.items],
        setting.side.size,
        fixed,
    )

    def plain_run() -> float:
        loss = plain_epoch(plain, dataset, optimizer, BATCH)
        assert 0 < loss < 4
        return loss

    count = len(setting.items)
    feature_bytes = count * setting.reader.layout.record_bytes
    loss = alternate(
        benchmark,
        lambda: our_epoch(setting, loader, tmp_path / "runs", precision),
        plain_run,
        dtype=precision,
        count=Count(3 * step_flops("fpt_plus", full) * count // BATCH, feature_bytes),
        rounds=3 if full else 1,
        is_long=True,
    )
    setting.reader.close()
    shutil.rmtree(tmp_path)  # pytest would keep it, and the page cache with it
    assert 0 < loss < 4
    benchmark.group = "epoch"
    info = benchmark.extra_info
    info |= {
        "part": part,
        "precision": precision,
        "feature_bytes": feature_bytes,
        "images": count,
    }
    if part == "epoch":
        info["shrink_seconds"] = shrink_seconds
        if benchmark.enabled:
            total = benchmark.stats.stats.median + shrink_seconds / EPOCHS
            info["ratio_over_20_epochs"] = info["plain_seconds"] / total
