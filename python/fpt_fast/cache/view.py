"""All records of a cache as tensors over its mapped files, whatever number of shards it has."""

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpt_fast.cache.format import Manifest
from fpt_fast.cache.layout import PAGE_BYTES, Part
from fpt_fast.records import SelectedTokens

# What Python's mmap module does not name (MAP_NORESERVE before 3.13).
_MAP_FIXED = 0x10
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_FAILED = ctypes.c_void_p(-1).value


def map_records(
    fds: Sequence[int], manifest: Manifest, *, writable: bool = True
) -> NDArray[np.uint8]:
    """Map the records of all shards one behind the other: u8 [M, record_bytes].

    Writing to a ``writable`` array changes private copies of pages in memory, never a file;
    writing to another kills the process.  The map goes when
    the array and everything made from it is gone; the descriptors may be closed before.  Raises
    ``OSError`` where the system cannot map it (a limit of address space; shards whose records do
    not begin at one of its pages).
    """
    if writable:
        protection, sharing = _READ_WRITE, mmap.MAP_PRIVATE | _MAP_NORESERVE
    else:
        protection, sharing = mmap.PROT_READ, mmap.MAP_SHARED
    record_bytes = manifest.layout.record_bytes
    total = len(manifest.keys) * record_bytes
    # A page more than the records, for the header of a single shard on a system of larger pages.
    reserved = total + PAGE_BYTES
    if len(fds) == 1:
        base = _map(None, reserved, protection, sharing, fds[0], 0)
        start = base + PAGE_BYTES
    else:
        anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        start = base = _map(None, reserved, 0, anonymous, -1, 0)
        try:
            at = base
            for shard, fd in enumerate(fds):
                length = manifest.shard_bytes(shard) - PAGE_BYTES
                _map(at, length, protection, sharing | _MAP_FIXED, fd, PAGE_BYTES)
                at += length
        except OSError:
            _libc().munmap(base, reserved)
            raise
    memory = (ctypes.c_uint8 * total).from_address(start)
    weakref.finalize(memory, _libc().munmap, base, reserved).atexit = False
    records: NDArray[np.uint8] = np.ctypeslib.as_array(memory)
    return records.reshape(-1, record_bytes)


def viewed_tokens(records: NDArray[np.uint8], parts: Sequence[Part]) -> SelectedTokens:
    """Tensors [M, ...] over ``records`` u8 [M, record_bytes], strided by the record."""
    return SelectedTokens(**{part.name: _strided(records, part) for part in parts})


def _strided(records: NDArray[np.uint8], part: Part) -> Tensor:
    # Through torch, since numpy has no float8.
    flat = torch.from_numpy(records)[:, part.offset : part.offset + part.bytes]
    typed = flat.view(getattr(torch, part.dtype))  # [M, elements of one record]
    strides = [math.prod(part.shape[axis + 1 :]) for axis in range(len(part.shape))]
    return typed.as_strided(
        (len(records), *part.shape), (typed.stride(0), *strides), typed.storage_offset()
    )


def _map(address: int | None, length: int, protection: int, flags: int, fd: int, at: int) -> int:
    result: int | None = _libc().mmap(address, length, protection, flags, fd, at)
    if result is None or result == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {length} bytes of a cache: {os.strerror(number)}")
    return result


def _libc() -> Any:
    """The C library; Python's own ``mmap`` cannot place one map behind another."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
        ctypes.c_int64,
    )
    libc.munmap.restype = ctypes.c_int
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return libc
