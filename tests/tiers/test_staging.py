"""Batches staged to a simulated device: right whatever runs when, and nothing overwritten early."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cache.samples import LAYOUTS, build_cache, keys
from tiers.simulation import SimulatedStreams
from torch import Tensor

from fpt_fast.cache import CacheReader
from fpt_fast.records import FeatureBatch, ImageItem, SweepBatch
from fpt_fast.tiers import ReadFeatures, Staging, StoredFeatures
from fpt_fast.tiers.sources import free_host_bytes, record_bytes

IMAGES, BATCH = 11, 3
TIERS = ("resident", "pinned", "disk")


@pytest.fixture(params=["float16", "int8"])
def reader(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CacheReader]:
    build_cache(tmp_path / "cache", IMAGES, layout=LAYOUTS[request.param])
    with CacheReader(tmp_path / "cache") as opened:
        yield opened


def items() -> list[ImageItem]:
    """In another order than the cache's rows."""
    return [ImageItem(key, Path(key), 0, "train") for key in reversed(keys(IMAGES))]


def source(tier: str, reader: CacheReader, streams: SimulatedStreams) -> Any:
    if tier == "disk":
        return ReadFeatures(reader, streams, batch_size=BATCH, workers=1)
    return StoredFeatures(reader, items(), streams, resident=tier == "resident")


def batches(features: Any, order: list[int], seeds: int = 1) -> Iterator[SweepBatch]:
    """As ``FeatureLoader`` makes them; the side input of image i is i + 100 * seed."""
    of = items()
    for start in range(0, len(order), BATCH):
        picked = order[start : start + BATCH]
        kept = features([of[i] for i in picked], [], [])
        values = torch.tensor(picked, dtype=torch.float32) + 100 * torch.arange(seeds)[:, None]
        side = values[:, :, None, None, None].repeat(1, 1, 3, 2, 2)
        side = side if seeds > 1 else side[:1].expand(2, -1, -1, -1, -1)
        yield SweepBatch(
            side,
            FeatureBatch(
                side[0],
                kept.kv,
                kept.rows,
                torch.tensor(picked),
                tuple(of[i].key for i in picked),
                kept.k_scales,
                kept.v_scales,
            ),
        )


def train(
    streams: SimulatedStreams, staging: Staging, made: Iterator[SweepBatch], reader: CacheReader
) -> list[Callable[[], None]]:
    """Queue work that compares each batch with the cache when the device gets to it."""
    checks = []
    for batch in staging(staging.pin(made_batch) for made_batch in made):
        expected = reader.read([reader.row(key) for key in batch.shared.keys])

        def work(batch: SweepBatch = batch, expected: Any = expected) -> None:
            shared = batch.shared
            for name in ("kv", "k_scales", "v_scales"):
                got, wanted = getattr(shared, name), getattr(expected, name)
                assert (got is None) == (wanted is None)
                if got is not None:
                    got = got if shared.rows is None else got[shared.rows]
                    assert torch.equal(as_bytes(got), as_bytes(wanted)), name
            picked = shared.labels.float()
            for seed, side in enumerate(batch.side_pixels):
                shift = 100 * seed if batch.side_pixels.stride(0) else 0
                assert torch.equal(side, (picked + shift)[:, None, None, None].expand_as(side))

        streams.queue("work", work)
        checks.append(work)
        del batch
    return checks


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("seed", [None, *range(6)])
def test_every_order_of_copies_and_work_gives_the_right_batches(
    reader: CacheReader, tier: str, seed: int | None
) -> None:
    streams = SimulatedStreams(None if seed is None else random.Random(seed))
    staging, features = Staging(streams), source(tier, reader, streams)
    for epoch in range(3):
        order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(epoch)).tolist()
        train(streams, staging, batches(features, order, seeds=1 + epoch), reader)
    streams.finish()
    assert streams.done["work"] == 12 == len(streams.queues["work"])


@pytest.mark.parametrize("lost", ["copied", "used", "in flight"])
def test_the_simulation_shows_a_missing_wait(
    reader: CacheReader, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without any one of the three rules that keep memory from being used early, it is."""
    streams = SimulatedStreams()
    staging, features = Staging(streams), source("disk", reader, streams)
    if lost == "copied":
        monkeypatch.setattr(streams, "hold_work", lambda mark: None)
    elif lost == "used":
        monkeypatch.setattr(streams, "hold_copies", lambda mark: None)
    else:

        class Forgetful(list[Any]):
            def append(self, item: Any) -> None:
                del item

        monkeypatch.setattr(staging, "_in_flight", Forgetful())
    with pytest.raises(AssertionError):
        train(streams, staging, batches(features, list(range(IMAGES))), reader)
        while lost == "used" and streams.run_one("copies"):
            pass
        streams.finish()


def test_the_device_holds_two_batches_and_the_host_a_few(reader: CacheReader) -> None:
    streams = SimulatedStreams()
    staging, features = Staging(streams), source("disk", reader, streams)
    for _ in range(4):
        train(streams, staging, batches(features, list(range(IMAGES))), reader)
    of_batch = BATCH * (record_bytes(reader) + 3 * 2 * 2 * 4)
    assert staging.device_bytes == 2 * of_batch
    # In flight there are as many as there are slots, and one that is being made.
    assert len(streams.buffers) <= 2 * 4


def test_slots_stay_where_they_are(reader: CacheReader) -> None:
    """A captured step reads the addresses that it was captured with."""
    streams = SimulatedStreams()
    staging, features = Staging(streams), source("pinned", reader, streams)
    seen = set()
    for _ in range(3):
        for batch in staging(map(staging.pin, batches(features, list(range(IMAGES))))):
            assert batch.shared.kv is not None
            seen.add((batch.shared.kv.data_ptr(), batch.side_pixels.data_ptr()))
    assert len(seen) == 2


def test_an_epoch_left_early_and_one_begun_in_another(reader: CacheReader) -> None:
    streams = SimulatedStreams()
    staging, features = Staging(streams), source("disk", reader, streams)
    first = staging(map(staging.pin, batches(features, list(range(IMAGES)))))
    next(first)
    train(streams, staging, batches(features, list(range(IMAGES))), reader)
    with pytest.raises(RuntimeError, match="staged before another iteration began"):
        list(first)
    streams.finish()


@pytest.mark.parametrize("tier", ["resident", "pinned"])
def test_a_store_holds_what_the_cache_holds_and_says_how_much(
    reader: CacheReader, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fpt_fast.tiers.sources._FILLED_AT_ONCE", 4)
    streams = SimulatedStreams()
    features = source(tier, reader, streams)
    assert features.store_bytes == IMAGES * record_bytes(reader)
    kept = features(items(), [], [])
    expected = reader.read([reader.row(item.key) for item in items()])
    assert torch.equal(kept.rows, torch.arange(IMAGES))
    for name in ("kv", "k_scales", "v_scales"):
        got, wanted = getattr(kept, name), getattr(expected, name)
        assert (got is None) == (wanted is None)
        assert got is None or torch.equal(as_bytes(got), as_bytes(wanted))
    assert streams.holds(kept.kv) == (tier == "resident")


def test_a_batch_without_features_brings_its_side_input(reader: CacheReader) -> None:
    streams = SimulatedStreams()
    staging = Staging(streams)
    [batch] = batches(source("disk", reader, streams), [4, 2])
    alone = SweepBatch(batch.side_pixels, replace(batch.shared, kv=None))
    for staged in staging(iter([staging.pin(alone)])):
        assert staged.shared.kv is None and streams.holds(staged.side_pixels)
        streams.queue("work", lambda: None)
        streams.finish()
        assert staged.side_pixels[0, :, 0, 0, 0].tolist() == [4.0, 2.0]


def test_free_memory_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   1234 kB\n")
    assert free_host_bytes(tmp_path / "meminfo") == 1234 * 1024
    assert free_host_bytes(tmp_path / "absent") > 1 << 28
