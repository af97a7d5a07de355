"""Memory that a step has freed stays with the process, for the next step.

glibc gives the end of the heap back to the system as soon as a little of it is free, and a step
frees all of its tensors: the next one takes the pages again, one fault and 4 KB of zeros each.
"""

import ctypes
import os
from collections.abc import Callable

import torch

# Of <malloc.h>; from what size on glibc maps memory by itself has 32 MB for its limit.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT, _MAPPED = 512 << 20, 32 << 20


def keep_freed_memory(device: torch.device) -> bool:
    """On a CPU, have glibc keep up to 512 MB of freed memory at the heap's end, until the process
    ends; True where it does.

    What the user says of glibc's allocator in the environment stands, and so does another C library
    or allocator.  Says it once or many times, which is the same.
    """
    said = [name for name in os.environ if name.startswith("MALLOC_")]
    if device.type != "cpu" or said or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = _mallopt()
    return mallopt is not None and all(
        mallopt(which, size) == 1
        for which, size in ((_MMAP_THRESHOLD, _MAPPED), (_TRIM_THRESHOLD, _KEPT))
    )


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's own, None where the C library is another."""
    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows has no such library
        return None
    return library.mallopt if hasattr(library, "gnu_get_libc_version") else None
