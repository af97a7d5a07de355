"""Copies of many records at once, by ``pread``, with the digest of each."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fpt_fast.cache.format import digest
from fpt_fast.cache.layout import RecordLayout
from fpt_fast.cache.storage import read_into
from fpt_fast.records import SelectedTokens


@dataclass(frozen=True, slots=True)
class Fetched:
    """What came of one record: the ``count`` of its bytes (too few where its file ended), and the
    digest of all of them, padding included (empty where none was asked for)."""

    count: int
    digest: bytes


class PythonFetch:
    """Reads in Python: ``preadv`` and xxhash release the interpreter's lock, the rest does not."""

    def __init__(self, layout: RecordLayout, threads: int) -> None:
        self._layout = layout
        self._threads = threads
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._local = threading.local()

    def __call__(
        self, places: Sequence[tuple[int, int]], tokens: SelectedTokens, *, digests: bool
    ) -> list[Fetched]:
        """Read the record at each (descriptor, offset) into its place in ``tokens``."""
        rows = {
            part.name: getattr(tokens, part.name).view(torch.uint8).numpy()
            for part in self._layout.parts
        }

        def one(image: int) -> Fetched:
            fd, offset = places[image]
            parts = {name: values[image].reshape(-1) for name, values in rows.items()}
            return self._read(fd, offset, parts, digests=digests)

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

    def _read(
        self, fd: int, offset: int, parts: dict[str, NDArray[np.uint8]], *, digests: bool
    ) -> Fetched:
        """``kv`` goes to its place at once; the little behind it, gaps and all, by a buffer."""
        kv = parts["kv"]
        if not hasattr(self._local, "rest"):
            self._local.rest = np.empty(self._layout.record_bytes - len(kv), np.uint8)
        rest = self._local.rest
        count = read_into(fd, kv.data, offset)
        if count == len(kv):
            count += read_into(fd, rest.data, offset + len(kv))
        for part in self._layout.parts[1:]:
            start = part.offset - len(kv)
            parts[part.name][:] = rest[start : start + part.bytes]
        whole = digests and count == self._layout.record_bytes
        return Fetched(count, digest(kv.data, rest.data) if whole else b"")
