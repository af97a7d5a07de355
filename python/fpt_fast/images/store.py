"""Decoded images kept in memory, so that a small data set is decoded once, not every epoch."""

import contextlib
import os
import threading
from pathlib import Path

from torch import Tensor

from fpt_fast.distributed import processes_here
from fpt_fast.images.decode import read_item
from fpt_fast.records import ImageItem, Reading

_MOST_BYTES = 4 * 2**30
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class DecodedStore:
    """Decoded images up to ``limit_bytes`` (default: a quarter of the memory, 4 GiB at most,
    shared out where several processes of a task are here).

    Once full it keeps what it has and decodes the rest anew each time.  Every epoch reads every
    image once, in a new order: evicting the least recently used would throw out images just
    before their turn (with room for half of them, 15 % hits; keeping the first half, 50 %).
    Threads may share it.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        if limit_bytes is not None and limit_bytes < 0:
            raise ValueError(f"limit_bytes must be at least 0, got {limit_bytes}")
        self.limit_bytes = _default_limit() if limit_bytes is None else limit_bytes
        self._images: dict[tuple[Path, Reading], Tensor] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    @property
    def used_bytes(self) -> int:
        """Bytes of the images held."""
        return self._bytes

    def get(self, item: ImageItem) -> Tensor:
        """Return the image as ``read_image`` gives it, [3, h, w] u8 or u16: do not write to it.

        Raises ``ImageError`` where it cannot be read.
        """
        place = (item.path, item.reading)
        image = self._images.get(place)
        if image is not None:
            return image
        # Outside the lock: two threads that want one image both decode it, and nobody waits.
        image = read_item(item)
        size = image.untyped_storage().nbytes()
        with self._lock:
            if place not in self._images and self._bytes + size <= self.limit_bytes:
                self._images[place] = image
                self._bytes += size
        return image

    def clear(self) -> None:
        """Let go of all images."""
        with self._lock:
            self._images.clear()
            self._bytes = 0


def _default_limit() -> int:
    return min(memory_bytes() // 4, _MOST_BYTES) // processes_here()


def memory_bytes() -> int:
    """Memory of this machine, or of the container that we are in."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every platform
        memory = 4 * 2**30
    # No such file outside of a container, and "max" in one without a limit.
    with contextlib.suppress(OSError, ValueError):
        memory = min(memory, int(_CGROUP_LIMIT.read_text()))
    return memory
