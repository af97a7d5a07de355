"""Where the features are kept during training: sizes in, one tier a split and the reason out.

The tiers of a GPU, the fastest first: ``resident`` (all records of a split in its memory),
``pinned`` (in pinned memory of the host, copied a batch ahead) and ``disk`` (read ahead into
pinned memory, then copied).  On a CPU the cache is used ``in place``, or read by ``disk``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fpt_fast.config import ConfigError

Tier = Literal["in place", "resident", "pinned", "disk"]
FeaturesOn = Literal["auto", "resident", "pinned", "disk"]

_GB = 10**9
# What model, optimiser, activations and CUDA's own things may take beside the features.
_DEVICE_RESERVE = _GB
_DEVICE_SHARE = 0.9
# Pinned memory cannot be swapped out: the rest of the machine must be able to live without it.
_HOST_SHARE = 0.5
STAGED_BATCHES = 2
"""Batches in GPU memory at a time where features are copied: one in use, one on its way."""


@dataclass(frozen=True, slots=True)
class SplitSize:
    """A split: its name, its images, and whether it is gone through in every epoch."""

    name: str
    images: int
    repeated: bool


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the choice depends on, in bytes: ``record`` is one image's keys, values and scales as
    the model reads them, ``side`` its side input; ``*_free`` what is free now on the device and on
    the host; ``workers`` threads read ahead; ``processes`` share the host."""

    record: int
    side: int
    batch_size: int
    workers: int
    device: str
    device_free: int
    host_free: int
    processes: int = 1

    @property
    def staging(self) -> int:
        """Device memory for the batches in use and on their way."""
        return STAGED_BATCHES * self.batch_size * (self.record + self.side)

    @property
    def reading(self) -> int:
        """Pinned memory for batches read from the disk: being read, waiting, being copied."""
        return (self.workers + 2 + STAGED_BATCHES) * self.batch_size * self.record

    @property
    def device_room(self) -> int:
        """Device memory that stores may take."""
        return device_room(self.device_free) - self.staging

    @property
    def host_room(self) -> int:
        """Host memory that pinned stores may take."""
        return int(_HOST_SHARE * self.host_free) // self.processes - self.reading


@dataclass(frozen=True, slots=True)
class Placement:
    """The tier of one split, the bytes of its store on device and host, and why that tier."""

    split: str
    tier: Tier
    reason: str
    device_bytes: int = 0
    host_bytes: int = 0


def choose_tiers(
    wanted: FeaturesOn, splits: Sequence[SplitSize], sizes: Sizes
) -> tuple[Placement, ...]:
    """The tier of each split, in their order; those before have their memory already.

    ``auto`` takes the fastest that fits.  A split that is read once stays on disk whatever is
    wanted: filling a store would cost as much as reading it.  Raises ``ConfigError`` for a tier
    that is wanted and cannot be, with the bytes that lack.
    """
    if sizes.device == "cpu":
        return tuple(_on_cpu(wanted, split) for split in splits)
    device_room, host_room = sizes.device_room, sizes.host_room
    placements = []
    for split in splits:
        placement = _on_gpu(wanted, split, split.images * sizes.record, device_room, host_room)
        device_room -= placement.device_bytes
        host_room -= placement.host_bytes
        placements.append(placement)
    return tuple(placements)


def _on_cpu(wanted: FeaturesOn, split: SplitSize) -> Placement:
    if wanted == "auto":
        return Placement(split.name, "in place", "the model is on the CPU and reads the cache")
    if wanted == "disk":
        return Placement(split.name, "disk", "--features-on disk: copies, read ahead")
    raise ConfigError(
        f"--features-on {wanted} is for a model on a GPU, and this one is on the CPU, which reads "
        "the cache in place; use auto, or disk for copies that are read ahead"
    )


def _on_gpu(
    wanted: FeaturesOn, split: SplitSize, store: int, device_room: int, host_room: int
) -> Placement:
    name = split.name
    if not split.repeated:
        return Placement(name, "disk", "they are read once")
    size = f"{gigabytes(store)} GB"
    on_device = f"{size}, and {gigabytes(device_room)} GB of GPU memory are to be had"
    on_host = f"{size}, and {gigabytes(host_room)} GB of host memory may be pinned"
    if wanted == "resident" or (wanted == "auto" and store <= device_room):
        _require(wanted, store, device_room, on_device)
        return Placement(name, "resident", f"they take {on_device}", device_bytes=store)
    if wanted == "pinned" or (wanted == "auto" and store <= host_room):
        _require(wanted, store, host_room, on_host)
        reason = f"they take {on_host}"
        if wanted == "auto":
            reason = f"they are more than the {gigabytes(device_room)} GB of GPU memory: {reason}"
        return Placement(name, "pinned", reason, host_bytes=store)
    if wanted == "disk":
        return Placement(name, "disk", "--features-on disk")
    return Placement(
        name,
        "disk",
        f"they take {size}, more than the {gigabytes(device_room)} GB of GPU memory and the "
        f"{gigabytes(host_room)} GB of host memory to be had",
    )


def _require(wanted: FeaturesOn, store: int, room: int, told: str) -> None:
    if store > room:
        other = "pinned, disk or auto" if wanted == "resident" else "disk or auto"
        raise ConfigError(
            f"--features-on {wanted}: the features take {told}, which is "
            f"{gigabytes(store - room)} GB too little; use {other}"
        )


def device_room(free: int) -> int:
    """Of so many free bytes, those that are left beside model, activations and CUDA's own."""
    return int(_DEVICE_SHARE * free) - _DEVICE_RESERVE


def gigabytes(count: int) -> str:
    """Bytes as people read them, in units of 10^9."""
    return f"{max(0, count) / _GB:.2f}"
