"""Converting a cache of f16 features into one of 8 bits, without the images or the frozen model."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fpt_fast.cache import CacheReader, CacheWriter, forecast
from fpt_fast.cache.format import DIGESTS
from fpt_fast.cache_settings import ConvertSettings
from fpt_fast.config import ConfigError
from fpt_fast.distributed import refuse_several
from fpt_fast.interrupts import stop_on_signals
from fpt_fast.pipeline.features import quantiser
from fpt_fast.setting_values import build_settings

log = logging.getLogger("fpt_fast")


@dataclass(frozen=True, slots=True)
class ConvertResult:
    """A converted cache: its images, how many were converted just now, and the bytes of the
    records before and after."""

    cache: Path
    images: int
    converted: int
    bytes_before: int
    bytes_after: int
    seconds: float


def convert(settings: ConvertSettings | None = None, **values: Any) -> ConvertResult:
    """Write the features of a cache in 8 bits into another one; see ``ConvertSettings``.

    The target equals, to the byte, a cache preloaded with ``features`` of that dtype, and is
    resumed, extended and repaired like one.  Every record of the source is checked on the way.
    Raises ``ConfigError`` where the source has 8 bits already: their rounding cannot be undone.
    """
    refuse_several("converting a cache")
    settings = settings or build_settings(ConvertSettings, values)
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {settings.batch_size}")
    source, target = settings.source.resolve(), settings.target.resolve()
    if target.is_relative_to(source):
        raise ConfigError(
            f"the target must be another directory than the source {settings.source}, and not "
            f"inside it, got {settings.target}"
        )
    quantise = quantiser(settings.dtype)
    if quantise is None:
        raise ConfigError(
            f"dtype must be int8 or float8_e4m3fn, got {settings.dtype!r}: the rounding of 8-bit "
            "features cannot be undone, and a float16 cache need not be converted"
        )
    started = time.monotonic()
    with CacheReader(settings.source, mode="pread") as reader:
        if reader.layout.dtype != "float16":
            raise ConfigError(
                f"{settings.source} holds {reader.layout.dtype} features, whose rounding cannot be "
                "undone, and a second one would add to it; convert the float16 cache, or preload "
                f"with --features {settings.dtype}"
            )
        layout = replace(reader.layout, dtype=settings.dtype)
        log.info("%s", forecast(layout, len(reader), settings.target))
        notes = dict(reader.notes)
        digests = notes.pop(DIGESTS, None)
        fingerprint = {**reader.fingerprint, "features": settings.dtype}
        with CacheWriter(
            settings.target,
            layout,
            fingerprint,
            reader.keys,
            digests=digests,
            notes=notes,
            quantise=quantise,
        ) as writer:
            pending = writer.pending
            _fill(reader, writer, pending, settings.batch_size)
            writer.finish()
        return ConvertResult(
            cache=settings.target,
            images=len(reader),
            converted=len(pending),
            bytes_before=len(reader) * reader.layout.record_bytes,
            bytes_after=len(reader) * layout.record_bytes,
            seconds=time.monotonic() - started,
        )


def _fill(reader: CacheReader, writer: CacheWriter, pending: list[int], size: int) -> None:
    grid = [pending[start : start + size] for start in range(0, len(pending), size)]
    with (
        stop_on_signals() as stop,
        tqdm(total=len(pending), desc="convert", unit="image", disable=None) as progress,
    ):
        for number, rows in enumerate(grid):
            tokens = reader.read(rows)
            if number + 1 < len(grid):
                reader.announce(grid[number + 1])
            writer.write(rows, tokens)
            progress.update(len(rows))
            stop.check("the finished records are kept: run the same command to go on")
