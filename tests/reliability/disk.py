"""Between the cache and the disk: every call that it makes below a directory, seen and bent.

The cache calls the disk through ``os``, ``fcntl.flock`` and ``mmap.mmap`` alone, by attribute, so
that standing in for these shows all; ``test_disk.py`` compares with what the kernel saw.
"""

import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# What changes the disk, or makes a change durable.
CHANGING = (
    *("pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync"),
    *("replace", "rename", "unlink", "mkdir", "create"),
)
_OS = (
    *("open", "close", "pwrite", "preadv", "pread", "fsync", "fdatasync", "ftruncate"),
    *("posix_fallocate", "posix_fadvise", "replace", "rename", "unlink", "mkdir"),
    *("stat", "lstat", "fstat", "scandir", "listdir", "statvfs"),
)
# The calls themselves, for hooks.
real = SimpleNamespace(**{name: getattr(os, name) for name in _OS})
_PLACES = (*((os, name) for name in _OS), (fcntl, "flock"), (mmap, "mmap"))


@dataclass(frozen=True)
class Call:
    """One call: its name (``create`` for an ``open`` that makes a file), arguments, and file."""

    name: str
    args: tuple[Any, ...]
    path: str
    target: str = ""  # of a rename


# Called in place of the disk; the second argument goes through to it.
Hook = Callable[[Call, Callable[[], Any]], Any]


@contextmanager
def watched(root: Path, hook: Hook) -> Iterator[None]:
    """While open, each call below ``root`` goes to ``hook``; everything else to the disk."""
    originals = {(place, name): getattr(place, name) for place, name in _PLACES}
    prefix = str(root.absolute())

    def stand_in(original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        path = _path_of(args[0]) if args else ""
        if path != prefix and not path.startswith(prefix + "/"):
            return original(*args, **kwargs)
        if name == "open" and args[1] & os.O_CREAT and not _exists(path):
            name = "create"
        target = os.fspath(args[1]) if name in ("rename", "replace") else ""
        call = Call(name, args, path, target)
        return hook(call, partial(original, *args, **kwargs))

    for (place, name), original in originals.items():
        setattr(place, name, partial(stand_in, original, name))
    try:
        yield
    finally:
        for (place, name), original in originals.items():
            setattr(place, name, original)


def _path_of(thing: Any) -> str:
    # By text: this is asked at every call, and a Path each time is slow.
    if isinstance(thing, int):
        try:
            return os.readlink(f"/proc/self/fd/{thing}")  # noqa: PTH115
        except OSError:
            return ""
    path = os.fspath(thing)
    return path if path.startswith("/") else f"{Path.cwd()}/{path}"


def _exists(path: str) -> bool:
    try:
        real.lstat(path)
    except OSError:
        return False
    return True


def calls_of(
    root: Path, work: Callable[[], None], names: tuple[str, ...] | None = None
) -> list[Call]:
    """The calls that ``work`` makes, in order; only those of ``names`` where given."""
    seen: list[Call] = []

    def note(call: Call, proceed: Callable[[], Any]) -> Any:
        if names is None or call.name in names:
            seen.append(call)
        return proceed()

    with watched(root, note):
        work()
    return seen


def open_descriptors() -> int:
    """How many descriptors this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))
