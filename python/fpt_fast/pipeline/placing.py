"""Where a run's features are kept: the tier of each split, said in the log, and its source."""

import logging
import os
from collections.abc import Collection
from typing import Any

import torch

from fpt_fast.cache import CacheReader
from fpt_fast.images import SideImages
from fpt_fast.loader import CachedFeatures, FeatureSource
from fpt_fast.records import SPLITS, ImageSet, Split
from fpt_fast.run_settings import RunSettings
from fpt_fast.tiers import (
    CudaStreams,
    Placement,
    ReadFeatures,
    Sizes,
    SplitSize,
    Staging,
    StoredFeatures,
    Streams,
    choose_tiers,
    device_room,
    free_host_bytes,
    gigabytes,
    record_bytes,
)

log = logging.getLogger("fpt_fast")


class PlacedFeatures:
    """The features of a cache, each split in its tier; ``repeated`` ones are gone through in every
    epoch.  A store is filled when its split is first asked for.

    Raises ``ConfigError`` for a tier that cannot be, ``ValueError`` for images that the cache
    lacks.
    """

    def __init__(
        self,
        settings: RunSettings,
        reader: CacheReader,
        images: ImageSet,
        device: torch.device,
        *,
        side_size: tuple[int, int],
        repeated: Collection[Split],
    ) -> None:
        splits = [SplitSize(s, len(images.of_split(s)), s in repeated) for s in SPLITS]
        self._settings, self._reader, self._images = settings, reader, images
        self._in_cache = CachedFeatures(reader, images.items)
        sizes = Sizes(
            record=record_bytes(reader),
            side=3 * 4 * side_size[0] * side_size[1],
            batch_size=settings.batch_size,
            workers=settings.workers,
            device=device.type,
            device_free=_free_device_bytes(device),
            host_free=free_host_bytes(),
            processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        )
        self._device_room = sizes.device_room
        self.placements: dict[str, Placement] = {
            placement.split: placement
            for placement in choose_tiers(
                settings.features_on, [split for split in splits if split.images], sizes
            )
        }
        self._streams = _open_streams(device)
        self.staging = None if self._streams is None else Staging(self._streams)
        self._sources: dict[str, FeatureSource] = {}

    @property
    def device_left(self) -> int:
        """Device memory that the stores leave to others, in bytes."""
        taken = sum(placement.device_bytes for placement in self.placements.values())
        return self._device_room - taken

    def source(self, split: Split) -> FeatureSource:
        """The features of one split, whose store is filled now where it has one."""
        if split not in self._sources:
            placement = self.placements[split]
            log.info("features of %s: %s, since %s", split, placement.tier, placement.reason)
            self._sources[split] = self._open(placement)
        return self._sources[split]

    def _open(self, placement: Placement) -> FeatureSource:
        if self._streams is None:
            return CachedFeatures(
                self._reader, self._images.items, in_place=placement.tier == "in place"
            )
        if placement.tier == "disk":
            return ReadFeatures(
                self._reader,
                self._streams,
                batch_size=self._settings.batch_size,
                workers=self._settings.workers,
            )
        items = self._images.of_split(placement.split)  # type: ignore[arg-type]
        return StoredFeatures(
            self._reader, items, self._streams, resident=placement.tier == "resident"
        )

    def memory(self) -> dict[str, Any]:
        """Bytes of each part on device and host, and why it is there, as JSON values."""
        return {
            "features": {
                split: {
                    "tier": self.placements[split].tier,
                    "reason": self.placements[split].reason,
                    "device_bytes": self.placements[split].device_bytes,
                    "host_bytes": self.placements[split].host_bytes,
                }
                for split in self._sources
            },
            "staging_device_bytes": 0 if self.staging is None else self.staging.device_bytes,
        }


def has_room_for(
    images: SideImages, placed: PlacedFeatures | None, device: torch.device | None
) -> bool:
    """Whether side images can lie on ``device`` beside the features; says so in the log."""
    if device is None:
        return False
    room = device_room(_free_device_bytes(device)) if placed is None else placed.device_left
    fits = images.levels.nbytes <= room
    log.info(
        "side images: %s GB, %s, since %s GB of GPU memory are left for them",
        gigabytes(images.levels.nbytes),
        "augmented on the device within the step" if fits else "augmented on the host",
        gigabytes(room),
    )
    return fits


def _open_streams(device: torch.device) -> Streams | None:
    """None on a CPU, where nothing is copied."""
    return CudaStreams(device) if device.type == "cuda" else None


def _free_device_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
