"""A run's records as JSON, and what differs between two runs' settings."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fpt_fast.metrics import finite_or_none
from fpt_fast.records import EpochRecord


@dataclass(frozen=True, slots=True)
class BegunEpoch:
    """An epoch that is under way: its number, loss and images of each step made, wall seconds."""

    epoch: int
    losses: list[float]
    sizes: list[int]
    seconds: float


def begun_to_json(begun: BegunEpoch) -> dict[str, Any]:
    """A begun epoch as JSON values; an f32 survives them bit for bit."""
    return {
        "epoch": begun.epoch,
        "losses": begun.losses,
        "sizes": begun.sizes,
        "seconds": begun.seconds,
    }


def begun_from_json(values: Mapping[str, Any]) -> BegunEpoch:
    """Inverse of ``begun_to_json``."""
    return BegunEpoch(**{name: values[name] for name in ("epoch", "losses", "sizes", "seconds")})


def record_to_json(record: EpochRecord) -> dict[str, Any]:
    """An epoch as JSON values; metrics that are not finite become None."""
    return {
        "epoch": record.epoch,
        "loss": record.loss,
        "learning_rate": record.learning_rate,
        "seconds": record.seconds,
        "val": {name: finite_or_none(value) for name, value in record.val.items()},
    }


def record_from_json(values: Mapping[str, Any]) -> EpochRecord:
    """Inverse of ``record_to_json``; None becomes NaN."""
    return EpochRecord(
        epoch=values["epoch"],
        loss=values["loss"],
        learning_rate=values["learning_rate"],
        seconds=values["seconds"],
        val={name: math.nan if value is None else value for name, value in values["val"].items()},
    )


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name every setting that differs, as ``key: before -> now``; empty where none does.

    A setting that a run of an earlier version does not have, or the other way round, differs
    unless it is None.
    """
    old, new = _flatten(before), _flatten(now)
    return ", ".join(
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    )


def _flatten(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if _holds_settings(value):
            inside = value if isinstance(value, Mapping) else dict(enumerate(value))
            flat |= _flatten(inside, f"{name}.")
        else:
            # JSON knows lists, not tuples.
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def _holds_settings(value: Any) -> bool:
    """Whether there are names in it: a mapping, or a list of such, and not one of numbers."""
    if isinstance(value, list | tuple):
        return any(map(_holds_settings, value))
    return isinstance(value, Mapping)
