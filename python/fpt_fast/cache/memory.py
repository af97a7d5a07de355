"""How much memory a cache may take while it is read, and memory that is used again."""

import os
import resource
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpt_fast.cache.layout import RecordLayout
from fpt_fast.records import SelectedTokens

_ALIGN = 64
_LIMITS = tuple(
    getattr(resource, name)
    for name in ("RLIMIT_AS", "RLIMIT_DATA", "RLIMIT_RSS")
    if hasattr(resource, name)
)


def memory_limit(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory that this process may take: the machine's, a cgroup's or a limit's.

    ``root`` and ``own`` are where Linux tells of control groups, of either version.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _LIMITS:
        soft, _ = resource.getrlimit(name)
        if soft != resource.RLIM_INFINITY:
            limits.append(soft)
    for file in _cgroup_files(root, own):
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdecimal():  # else "max"
            limits.append(int(text))
    return min(limits)


def _cgroup_files(root: Path, own: Path) -> list[Path]:
    """Files that may hold a limit, from the process's own group up to the root."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    files = []
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        group = Path(path.strip("/"))
        if number == "0" and not controllers:
            base, name = root, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        files += [base / folder / name for folder in (group, *group.parents)]
    return files


def allocate_tokens(
    layout: RecordLayout, images: int, buffer: NDArray[np.uint8] | None = None
) -> SelectedTokens:
    """Uninitialised tokens of ``images`` records, all in one ``buffer`` (None: a new one)."""
    if buffer is None:
        buffer = np.empty(token_bytes(layout, images), np.uint8)
    memory = torch.from_numpy(buffer)
    tensors: dict[str, Tensor] = {}
    at = 0
    for part in layout.parts:
        end = at + images * part.bytes
        typed = memory[at:end].view(getattr(torch, part.dtype))
        tensors[part.name] = typed.view(images, *part.shape)
        at = -(-end // _ALIGN) * _ALIGN
    return SelectedTokens(**tensors)


def token_bytes(layout: RecordLayout, images: int) -> int:
    """Bytes of the buffer of ``allocate_tokens``; never none, which would have no strides."""
    return _ALIGN + sum(-(-images * part.bytes // _ALIGN) * _ALIGN for part in layout.parts)


def _plain_memory(count: int) -> NDArray[np.uint8]:
    return np.empty(count, np.uint8)


class BufferPool:
    """Buffers that come back when the last tensor over them is gone; ``make`` makes new ones.

    Fresh memory costs a page fault every 4 KB, which is slower than the copy that fills it.
    """

    def __init__(
        self, keep: int = 4, make: Callable[[int], NDArray[np.uint8]] | None = None
    ) -> None:
        self._make = _plain_memory if make is None else make
        # Its pop and append are atomic: a finaliser may run in any thread, at any instant.
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=keep)

    def take(self, count: int) -> NDArray[np.uint8]:
        """A buffer of ``count`` bytes, u8, uninitialised; it returns to the pool by itself."""
        try:
            whole = self._free.pop()
        except IndexError:
            whole = self._make(count)
        if not count <= whole.size <= 2 * count:
            whole = self._make(count)
        lease = whole[:count]
        weakref.finalize(lease, self._free.append, whole).atexit = False
        return lease
