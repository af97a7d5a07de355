"""What a cache can refuse, and why: each message says what came and what to do next."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ABSENT = "(absent)"


class CacheError(Exception):
    """Base of everything that a cache refuses; constructible from its message alone."""


class CacheMismatch(CacheError, ValueError):
    """A sound cache, but not the one that was asked for."""


class CacheCorrupt(CacheError, ValueError):
    """Bytes that are not what was written; names the file, the key, and the way to repair."""


class CacheUnfinished(CacheError, RuntimeError):
    """A build that has not ended yet; preloading again resumes it."""


class CacheNotFound(CacheError, FileNotFoundError):
    """No cache at that path."""


class CacheFull(CacheError, OSError):
    """The disk, a quota or a file size limit ended a write; the cache stays resumable."""


class CacheBusy(CacheError, RuntimeError):
    """Another process is building this cache."""


class CacheKeyError(CacheError, KeyError):
    """An image that the cache has no features of."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which makes a sentence hard to read.
        return str(self.args[0]) if self.args else ""


class FeatureValueError(CacheError, ValueError):
    """Features that f16 cannot hold: NaN, infinity or overflow; names image and layer."""


def repair_command(directory: Path, backbone: str = "BACKBONE") -> str:
    """What to paste into a shell, DATA being left to fill in."""
    cache, model = shlex.quote(str(directory)), shlex.quote(backbone)
    return f"`fpt-fast cache repair --cache {cache} --backbone {model} --data DATA`"


def corrupt(file: Path, reason: str) -> CacheCorrupt:
    """``CacheCorrupt`` about ``file``, with the way out."""
    return CacheCorrupt(
        f"{file}: {reason}; run {repair_command(file.parent)} "
        "with the backbone and data that it was preloaded from"
    )


def differences(cache: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Fields that differ, as (dotted name, value in the cache, value asked), in name order.

    Nested mappings are compared field by field; a field that one side lacks is ``ABSENT``.
    """
    found: list[tuple[str, Any, Any]] = []
    for name in sorted({*cache, *asked}):
        ours, theirs = cache.get(name, ABSENT), asked.get(name, ABSENT)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += [(f"{name}.{inner}", a, b) for inner, a, b in differences(ours, theirs)]
        elif ours != theirs or isinstance(ours, bool) != isinstance(theirs, bool):
            found.append((name, ours, theirs))
    return found


def mismatch(directory: Path, fields: Sequence[tuple[str, Any, Any]]) -> CacheMismatch:
    """``CacheMismatch`` that lists every differing field."""
    lines = "".join(
        f"\n  {name}: the cache has {_shown(ours)}, asked for {_shown(theirs)}"
        for name, ours, theirs in fields
    )
    return CacheMismatch(
        f"{directory} was made with other settings:{lines}\n"
        "use another --cache directory, or delete this one and preload again"
    )


def _shown(value: Any) -> str:
    text = value if value is ABSENT else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."


def refuse_changed_images(
    path: Path, recorded: Mapping[str, str], found: Mapping[str, str]
) -> None:
    """Raise ``CacheMismatch`` where an image is not the one that its features were made from."""
    changed = [key for key, digest in found.items() if recorded.get(key, digest) != digest]
    if changed:
        shown = ", ".join(map(repr, changed[:5])) + (", ..." if len(changed) > 5 else "")
        raise CacheMismatch(
            f"{path}: {len(changed)} of {len(found)} images are not those that the features were "
            f"made from ({shown}); preload them into another --cache directory, or name the cache "
            "that belongs to this data"
        )
