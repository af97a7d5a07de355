"""Copies of many records at once, by ``pread``, with the digest of each."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpt_fast.cache.format import digest
from fpt_fast.cache.layout import RecordLayout
from fpt_fast.cache.storage import naming, read_into
from fpt_fast.ops.native_records import can_read_records, read_records
from fpt_fast.records import SelectedTokens

# In the order of csrc/read_records.cpp.
_KINDS = ("file", "direct", "map")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is: ``offset`` in a file, opened past the page cache or not, or in a map."""

    fd: int
    offset: int
    kind: Literal["file", "direct", "map"] = "file"


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of one record: the ``count`` of its bytes (too few where its file ended), and the
    digest of all of them, padding included (empty where none was asked for)."""

    count: int
    digest: bytes


class Fetch(Protocol):
    """Reads the record at each place into its row of ``tokens``; unless it is ``native``, all
    places must be in files, and not direct."""

    native: bool

    def __call__(
        self,
        places: Sequence[Place],
        tokens: SelectedTokens,
        *,
        digests: bool,
        mapped: Tensor | None = None,
    ) -> list[Fetched]:
        """What came of each; raises ``OSError`` where the disk does."""
        ...

    def close(self) -> None:
        """End its threads."""
        ...


def make_fetch(layout: RecordLayout, threads: int) -> Fetch:
    """The C++ extension's where it is there, else Python's."""
    return NativeFetch(layout, threads) if can_read_records() else PythonFetch(layout, threads)


class NativeFetch:
    """Reads in C++; what is mapped comes from memory once, to be hashed and copied."""

    native = True

    def __init__(self, layout: RecordLayout, threads: int) -> None:
        self._layout = layout
        self._threads = threads

    def __call__(
        self,
        places: Sequence[Place],
        tokens: SelectedTokens,
        *,
        digests: bool,
        mapped: Tensor | None = None,
    ) -> list[Fetched]:
        """Read the record at each place into its row of ``tokens``."""
        images = len(places)
        rows = {
            part.name: getattr(tokens, part.name).view(torch.uint8).view(images, part.bytes)
            for part in self._layout.parts
        }
        lacking = torch.empty(images, 0, dtype=torch.uint8)
        counts, hashes = read_records(
            torch.tensor([(p.fd, p.offset, _KINDS.index(p.kind)) for p in places]),
            torch.empty(0, dtype=torch.uint8) if mapped is None else mapped,
            *(rows.get(name, lacking) for name in ("kv", "k_scales", "v_scales", "index")),
            record_bytes=self._layout.record_bytes,
            digests=digests,
            threads=self._threads,
        )
        fetched = []
        for place, count, value in zip(places, counts.tolist(), hashes.numpy(), strict=True):
            if count < 0:
                with naming(place.fd):
                    raise OSError(-count, os.strerror(-count))
            whole = digests and count == self._layout.record_bytes
            fetched.append(Fetched(count, value.tobytes() if whole else b""))
        return fetched

    def close(self) -> None:
        """Nothing to end: its threads live for one call."""


class PythonFetch:
    """Reads in Python: ``preadv`` and xxhash release the interpreter's lock, the rest does not."""

    native = False

    def __init__(self, layout: RecordLayout, threads: int) -> None:
        self._layout = layout
        self._threads = threads
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._local = threading.local()

    def __call__(
        self,
        places: Sequence[Place],
        tokens: SelectedTokens,
        *,
        digests: bool,
        mapped: Tensor | None = None,
    ) -> list[Fetched]:
        """Read the record at each place into its row of ``tokens``."""
        rows = {
            part.name: getattr(tokens, part.name).view(torch.uint8).numpy()
            for part in self._layout.parts
        }

        def one(image: int) -> Fetched:
            parts = {name: values[image].reshape(-1) for name, values in rows.items()}
            return self._read(places[image], parts, digests=digests)

        images = range(len(places))
        if self._threads == 1 or len(places) == 1:
            return [one(image) for image in images]
        return list(self._executor().map(one, images))

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None and self._pool[0] == os.getpid():
            self._pool[1].shutdown()
        self._pool = None

    def _executor(self) -> ThreadPoolExecutor:
        # The threads of a pool do not survive a fork; a pool belongs to one process.
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), ThreadPoolExecutor(self._threads))
        return self._pool[1]

    def _read(self, place: Place, parts: dict[str, NDArray[np.uint8]], *, digests: bool) -> Fetched:
        """``kv`` goes to its place at once; the little behind it, gaps and all, by a buffer."""
        kv = parts["kv"]
        if not hasattr(self._local, "rest"):
            self._local.rest = np.empty(self._layout.record_bytes - len(kv), np.uint8)
        rest = self._local.rest
        count = read_into(place.fd, kv.data, place.offset)
        if count == len(kv):
            count += read_into(place.fd, rest.data, place.offset + len(kv))
        for part in self._layout.parts[1:]:
            start = part.offset - len(kv)
            parts[part.name][:] = rest[start : start + part.bytes]
        whole = digests and count == self._layout.record_bytes
        return Fetched(count, digest(kv.data, rest.data) if whole else b"")
