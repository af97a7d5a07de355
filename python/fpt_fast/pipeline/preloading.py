"""Preloading: every image once through the frozen model, selected features into the cache."""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from tqdm import tqdm

from fpt_fast.backbone import FrozenBackbone
from fpt_fast.cache import (
    CacheCorrupt,
    CacheMismatch,
    CacheNotFound,
    SharedWriter,
    forecast,
    inspect_cache,
)
from fpt_fast.config import ConfigError, FptConfig, preset
from fpt_fast.distributed import World, open_world
from fpt_fast.images import digest_images, iter_image_batches
from fpt_fast.interrupts import stop_on_signals
from fpt_fast.pipeline.data import open_image_set, patient_notes, reading_of
from fpt_fast.pipeline.features import (
    FeaturePlan,
    parse_optional_layers,
)
from fpt_fast.pipeline.planning import make_plan
from fpt_fast.profiling import span
from fpt_fast.records import ImageBatch, ImageItem, SelectedTokens
from fpt_fast.selection import select_features
from fpt_fast.setting_values import build_settings, parse_size
from fpt_fast.settings import PreloadSettings
from fpt_fast.words import counted

log = logging.getLogger("fpt_fast")


@dataclass(frozen=True, slots=True)
class PreloadResult:
    """What preloading did: images in the cache, those computed now, bytes, wall seconds."""

    cache: Path
    images: int
    computed: int
    bytes: int
    seconds: float


def preload(settings: PreloadSettings | None = None, **values: Any) -> PreloadResult:
    """Build, resume or complete a feature cache; see ``PreloadSettings`` for the arguments.

    Raises ``CacheMismatch`` where the directory holds features of other settings,
    ``UnreadableImages``, ``CacheFull``, and ``Stopped`` after SIGTERM or Ctrl-C; in each case
    what was finished stays valid and the same call goes on from there.
    """
    settings = settings or build_settings(PreloadSettings, values)
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {settings.batch_size}")
    parse_size("input_size", settings.input_size)
    _check_cache_directory(settings.cache, settings.data)
    # What can be refused without looking at a single image comes first.
    method = preset(
        settings.method,
        layers=parse_optional_layers(settings.layers),
        token_ratio=settings.token_ratio,
        importance=settings.importance,
    )
    with open_world(settings.device) as world:
        return _preload(settings, method, world)


def _preload(settings: PreloadSettings, method: FptConfig, world: World) -> PreloadResult:
    images = open_image_set(settings, reading=reading_of(settings), world=world)
    plan, backbone = make_plan(
        settings,
        settings.backbone,
        settings.input_size,
        method,
        images,
        recorded=recorded_plan(settings.cache),
        features=settings.features,
        world=world,
    )
    if world.is_first:
        log.info("%s", forecast(plan.layout, len(images.items), settings.cache))
    started = time.monotonic()
    keys = [item.key for item in images.items]
    digests = list(digest_images(images.items, workers=settings.workers, world=world).values())
    asked = {"batch_size": settings.batch_size, **plan.fingerprint()}
    world.require_same(json.dumps(asked, sort_keys=True), "settings")
    with SharedWriter(
        world,
        settings.cache,
        plan.layout,
        plan.fingerprint(),
        keys,
        digests=digests,
        notes=plan.sources() | patient_notes(settings),
        quantise=plan.quantise,
    ) as writer:
        pending = set(writer.pending)
        if 0 < len(pending) < len(keys):
            log.info("resuming: %d of %d images are done", len(keys) - len(pending), len(keys))
        if pending and world.is_first:
            log.info(
                "this takes about %s for %s (more where decoding is slower)",
                _duration(len(pending) * _seconds_per_image(plan, backbone) / world.size),
                counted(len(pending), "image"),
            )
        _fill(writer, images.items, pending, plan, backbone, settings, world)
        writer.finish()
    if settings.fit == "pad" and world.is_first:
        log.info(
            "images are padded: what share of the kept tokens lies in the padding, fpt-fast doctor "
            "says, told of the data as preload was and of --cache %s",
            settings.cache,
        )
    return PreloadResult(
        cache=settings.cache,
        images=len(keys),
        computed=len(pending),
        bytes=plan.layout.record_bytes * len(keys),
        seconds=time.monotonic() - started,
    )


def _seconds_per_image(plan: FeaturePlan, backbone: FrozenBackbone) -> float:
    """Wall time of a frozen pass over one blank image, after one to warm up."""
    frozen = plan.frozen_pass(backbone)
    pixels = torch.zeros(1, 3, *plan.preprocessing.size)
    frozen(pixels).cpu()
    started = time.monotonic()
    # Reading the result back waits for the device.
    frozen(pixels).cpu()
    return time.monotonic() - started


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _check_cache_directory(cache: Path, data: Path) -> None:
    if cache.exists() and not cache.is_dir():
        raise ConfigError(f"--cache must be a directory, {cache} is a file; name another")
    if cache.resolve() == data.resolve():
        raise ConfigError(
            f"--cache must not be the folder of the images, got {cache} for both; name another"
        )


def recorded_plan(cache: Path) -> FeaturePlan | None:
    """The plan of a cache of our own that is there already, finished or not."""
    try:
        fingerprint = inspect_cache(cache).fingerprint
        plan = FeaturePlan.from_json(fingerprint)
    except (CacheNotFound, CacheCorrupt, CacheMismatch, ConfigError):
        # The writer says what is wrong with it, and what to do.
        return None
    # It says that, too, of features that were imported: no plan has all that tells them apart.
    return None if fingerprint.keys() - plan.fingerprint().keys() else plan


def _fill(
    writer: SharedWriter,
    items: tuple[ImageItem, ...],
    pending: set[int],
    plan: FeaturePlan,
    backbone: FrozenBackbone,
    settings: PreloadSettings,
    world: World,
) -> None:
    """Compute the pending records, batch by batch, each rank its share of the batches.

    Batches lie on a fixed grid over the key list and are computed whole, even where only some of
    their records are pending: the last bits of a matrix product may depend on the batch it was
    in, and a resumed cache must equal one built in one go byte for byte.
    """
    size = settings.batch_size
    grid = [range(start, min(start + size, len(items))) for start in range(0, len(items), size)]
    due = [cell for cell in grid if not pending.isdisjoint(cell)]
    mine = {position for at in world.share(len(due)) for position in due[at]}
    batches = iter_image_batches(
        items,
        plan.preprocessing,
        batch_size=size,
        workers=settings.workers,
        skip_positions=[position for position in range(len(items)) if position not in mine],
    )
    with (
        stop_on_signals() as stop,
        _open_bar(len(pending), world) as progress,
    ):
        log_line = _LogLines(len(pending), enabled=world.is_first and bool(progress.disable))
        # The longest share has so many; a rank with fewer helps the others to go on.
        for _ in range(-(-len(due) // world.size)):
            positions, tokens = _next_tokens(batches, plan, backbone)
            with span("write"):
                fresh = writer.write(positions, tokens)
            progress.update(fresh)
            log_line.update(fresh)
            stop.check(
                "the finished records are kept: run the same command to go on",
                elsewhere=world.any(stop.requested),
            )


def _next_tokens(
    batches: Iterator[tuple[list[int], ImageBatch]], plan: FeaturePlan, backbone: FrozenBackbone
) -> tuple[list[int], SelectedTokens | None]:
    """Positions and features of the next batch; none where there is none left."""
    positions, batch = next(batches, ([], None))
    if batch is None:
        return [], None
    return positions, select_features(
        backbone,
        batch.pixels,
        layers=plan.layers,
        token_ratio=plan.token_ratio,
        importance=plan.importance,
    )


def _open_bar(total: int, world: World) -> "tqdm[NoReturn]":
    """A bar where stderr is a terminal, of the first rank alone."""
    disable = None if world.is_first else True
    return tqdm(total=total, desc="preload", unit="image", disable=disable)


class _LogLines:
    """Progress for logs: a line every half minute with rate and remaining time."""

    def __init__(self, total: int, *, enabled: bool) -> None:
        self._total, self._enabled = total, enabled
        self._done = 0
        self._started = self._last = time.monotonic()

    def update(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if not self._enabled or (now - self._last < 30 and self._done < self._total):
            return
        self._last = now
        rate = self._done / max(now - self._started, 1e-9)
        log.info(
            "preload: %d of %d images, %.2f images/s, %.0f s left",
            self._done,
            self._total,
            rate,
            (self._total - self._done) / max(rate, 1e-9),
        )
