"""The training step as ``trainer.fit`` runs it: by tier of the features and way of launching.

Reading, copying and the side images' augmentation are in it; what is timed are whole epochs over
their steps.  The features are random, in a cache that is made here.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench_training_step import BATCH, METHODS, OUTPUTS, method_config, spec, step_flops
from benchmarks.counts import Count, floor_seconds
from benchmarks.device.phases import Options
from benchmarks.device.schedule import Item
from benchmarks.device.timing import forget
from fpt_fast.cache import CacheReader, CacheWriter, RecordLayout
from fpt_fast.config import AugmentConfig, TrainConfig
from fpt_fast.images import DecodedStore, SideImages
from fpt_fast.loader import CachedFeatures, FeatureLoader, FeatureSource
from fpt_fast.model import FptModel, create_model
from fpt_fast.records import (
    EpochRecord,
    ImageItem,
    KeptFeatures,
    Preprocessing,
    SelectedTokens,
    TrainingHistory,
)
from fpt_fast.tiers import CudaStreams, ReadFeatures, Staging, StoredFeatures
from fpt_fast.trainer import fit

BATCHES = (16, 64, 256)
WAYS = ("graph", "graph triton", "eager")
_LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch", "cudaMemcpyAsync")


def items(options: Options) -> list[Item]:
    """Batch 16 first, and what the bars ask for; compiled models last: compiling takes long."""
    rows = [(m, BATCH, "resident", way) for m in METHODS for way in WAYS]
    rows += [(m, BATCH, tier, "graph") for m in METHODS for tier in ("disk", "pinned")]
    rows += [(m, n, "resident", way) for n in BATCHES[1:] for m in METHODS for way in WAYS]
    rows += [(m, BATCH, "resident", "compiled graph") for m in METHODS]
    if options.is_dry:
        # Each way once; interpreted kernels take seconds a step, and other phases run them.
        rows = [row for row in rows if row[:2] == (METHODS[0], BATCH) and "triton" not in row[3]]
    return [
        Item(
            f"step {method} x{count} {tier} {way}",
            lambda _, row=(method, count, tier, way): measure(options, *row),
            least=40.0 if way.startswith("compiled") else 6.0,
        )
        for method, count, tier, way in rows
    ]


def measure(options: Options, method: str, count: int, tier: str, way: str) -> dict[str, Any]:
    """Seconds a step, launches a step, peak of the device's memory, share of the floor."""
    full = not options.is_dry
    steps, epochs = (64, 5) if full else (2, 3)
    count = count if full else 2
    model = _model(method, way, full)
    watch = Watch(steps, epochs, options.device)
    with tempfile.TemporaryDirectory() as folder, _cache(Path(folder), model, count, full) as cache:
        if full:
            torch.cuda.reset_peak_memory_stats()
        loader = _loader(cache, model, options.device, tier, count, steps, "graph" in way)
        step: Any = "eager"
        if "graph" in way:
            # Without a GPU there is nothing to capture: the same step, operation by operation.
            step = "graph" if full else lambda body: body
        fit(
            model,
            loader,
            None,
            TrainConfig(epochs=epochs, batch_size=count, monitor="accuracy"),
            run_dir=Path(folder) / "run",
            num_classes=OUTPUTS,
            device=str(options.device),
            progress=False,
            callbacks=[watch],
            step=step,
        )
        feature_bytes = count * sum(p.bytes for p in cache.layout.parts if p.name == "kv")
    work = Count(3 * step_flops(method, full) * count // BATCH, 2 * feature_bytes)
    floor = floor_seconds(work, options.ceilings, "float16")
    row = {**watch.row(), "batch": count, "tier": tier, "way": way}
    row |= {"floor_seconds": floor, "share_of_floor": floor / row["seconds"]}
    forget()
    return row


class Watch:
    """Times of the epochs but the first, which captures; launches of the last, not timed."""

    def __init__(self, steps: int, epochs: int, device: torch.device) -> None:
        self._steps, self._epochs, self._device = steps, epochs, device
        self._seconds: list[float] = []
        self._profile: Any = None
        self._launches = 0.0

    def on_epoch_end(self, record: EpochRecord) -> None:
        """Take the epoch's time; count in the next one where it is the last."""
        if 0 < record.epoch < self._epochs - 1:
            self._seconds.append(record.seconds)
        if record.epoch == self._epochs - 2:
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()
        elif record.epoch == self._epochs - 1:
            self._profile.stop()
            calls = sum(
                event.count
                for event in self._profile.key_averages()
                if event.key.startswith(_LAUNCHES)
            )
            self._launches = calls / self._steps

    def on_end(self, history: TrainingHistory) -> None:
        """Nothing is left to do."""

    def row(self) -> dict[str, Any]:
        """What was seen; the least of the epochs, since a loader's threads share the machine."""
        on_gpu = self._device.type == "cuda"
        return {
            "seconds": min(self._seconds) / self._steps,
            "launches": self._launches,
            "peak": torch.cuda.max_memory_allocated() if on_gpu else None,
        }


class Repeated:
    """The records of a small cache over and over, for items that it does not have."""

    needs_images = False

    def __init__(self, features: FeatureSource, kept: Sequence[ImageItem]) -> None:
        self._features, self._kept = features, kept

    def __call__(
        self, items: Sequence[ImageItem], images: Sequence[Tensor], seeds: Sequence[int]
    ) -> KeptFeatures | None:
        """Those of the item's number, modulo the cache."""
        return self._features([self._of(item) for item in items], images, seeds)

    def announce(self, items: Sequence[ImageItem]) -> None:
        """As the cache's own."""
        self._features.announce([self._of(item) for item in items])

    def _of(self, item: ImageItem) -> ImageItem:
        return self._kept[int(item.key) % len(self._kept)]


def _model(method: str, way: str, full: bool) -> FptModel:
    model = create_model(method_config(method, full), backbone=spec(full), num_classes=OUTPUTS)
    if way.endswith("triton") and model.fusion is not None:
        model.fusion.impl = "triton"
    if way.startswith("compiled"):
        model.compile(backend="inductor" if full else "aot_eager")
    return model


@contextmanager
def _cache(folder: Path, model: FptModel, count: int, full: bool) -> Iterator[CacheReader]:
    """A cache of random records, as many as a batch has, or 64."""
    records = max(count, 64) if full else 3
    kept = 205 if full else 9
    layout = RecordLayout(len(model.layers), model.spec.num_heads, kept, model.spec.head_width)
    index = torch.arange(kept, dtype=torch.int32).expand(1, *layout.index_shape)
    with CacheWriter(folder / "cache", layout, {}, [str(i) for i in range(records)]) as writer:
        for row in range(records):
            writer.write([row], SelectedTokens(torch.randn(1, *layout.kv_shape).half(), index))
        writer.finish()
    with CacheReader(folder / "cache") as reader:
        yield reader


def _loader(
    cache: CacheReader,
    model: FptModel,
    device: torch.device,
    tier: str,
    count: int,
    steps: int,
    within_step: bool,
) -> FeatureLoader:
    """Batches of random side images and of the cache's records in their tier."""
    kept = [ImageItem(key, Path(key), 0, "train") for key in cache.keys]
    items = [ImageItem(str(i), Path(str(i)), i % OUTPUTS, "train") for i in range(count * steps)]
    size = model.config.side_size
    side = Preprocessing(size, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    edges = (2 * size[0], 2 * size[1])
    # One memory for all: the values do not change the time.
    levels = torch.randint(256, (1, 3, *edges), dtype=torch.uint8).expand(len(items), -1, -1, -1)
    extents = torch.tensor(edges).expand(len(items), -1)
    features: FeatureSource = CachedFeatures(cache, kept)
    staging = None
    if device.type == "cuda":
        streams = CudaStreams(device)
        staging = Staging(streams)
        features = (
            ReadFeatures(cache, streams, batch_size=count, workers=8)
            if tier == "disk"
            else StoredFeatures(cache, kept, streams, resident=tier == "resident")
        )
    return FeatureLoader(
        items,
        Repeated(features, kept),
        side,
        batch_size=count,
        store=DecodedStore(),
        augmentation=AugmentConfig(),
        side_images=SideImages(levels, extents, extents),
        shuffle=True,
        workers=8 if device.type == "cuda" else 2,
        staging=staging,
        side_device=device if within_step else None,
    )
