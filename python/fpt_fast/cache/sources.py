"""The open shards of a finished cache: where each record is read from, and what stays in memory."""

import contextlib
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from fpt_fast.cache.errors import corrupt
from fpt_fast.cache.fetch import Place
from fpt_fast.cache.format import Manifest, shard_file
from fpt_fast.cache.layout import PAGE_BYTES
from fpt_fast.cache.shards import open_shard
from fpt_fast.cache.storage import naming

# Absent on macOS.
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_ADVISES = hasattr(os, "posix_fadvise")


class Sources:
    """Descriptors of all shards of the cache in ``directory``, checked on opening.

    ``resident`` records, the first ones, may stay in the page cache.  The others are read past it
    where ``direct`` says that the reader can and the file system can too, else dropped from it
    after they are read.  It is always the same ones: left to itself, the kernel would keep those
    read last, which a shuffled epoch asks for last.

    Raises ``CacheCorrupt`` as ``open_shard`` does.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, resident: int, direct: bool) -> None:
        self._directory, self._manifest = directory, manifest
        self._resident = resident
        self._announced: set[int] = set()
        self._direct: dict[int, int] = {}
        self.fds: list[int] = []
        try:
            for shard in range(manifest.shard_count):
                self.fds.append(open_shard(directory, manifest, shard))
            if direct and not self.fits:
                self._open_direct()
        except BaseException:
            self.close()
            raise

    @property
    def fits(self) -> bool:
        """True where all records may stay in memory."""
        return len(self._manifest.keys) <= self._resident

    def place(self, row: int) -> Place:
        """Where the record of a row is read from."""
        shard, offset = self._manifest.locate(row)
        if row >= self._resident and shard in self._direct:
            return Place(self._direct[shard], offset, "direct")
        return Place(self.fds[shard], offset)

    def file_of(self, row: int) -> Path:
        """The file that holds the record of a row."""
        return self._file(self._manifest.locate(row)[0])

    def check_sizes(self, rows: Iterable[int]) -> None:
        """Raise ``CacheCorrupt`` where a shard has become shorter, ``ValueError`` after ``close``.

        Reading a map beyond its file's end would kill the process.
        """
        if not self.fds:
            raise ValueError("this CacheReader is closed; open another one")
        for shard in {self._manifest.locate(row)[0] for row in rows}:
            with naming(self._file(shard)):
                size = os.fstat(self.fds[shard]).st_size
            expected = self._manifest.shard_bytes(shard)
            if size < expected:
                raise corrupt(self._file(shard), f"has {size} bytes, was opened with {expected}")

    def announce(self, rows: Iterable[int]) -> None:
        """Have the kernel read these records into the page cache, unless it was told already."""
        for row in rows:
            if row not in self._announced:
                self._announced.add(row)
                self._advise(row, "POSIX_FADV_WILLNEED")

    def done(self, rows: Iterable[int]) -> None:
        """These records were read."""
        # Of a cache that fits, each record is announced once: after that it is in memory.
        if not self.fits:
            self._announced.difference_update(rows)
            for row in rows:
                if row >= self._resident:
                    self._advise(row, "POSIX_FADV_DONTNEED")

    def close(self) -> None:
        """Close all descriptors; harmless when called again."""
        # Taken away first: a descriptor whose close fails is closed all the same.
        fds = [*self.fds, *self._direct.values()]
        self.fds, self._direct = [], {}
        for fd in fds:
            with contextlib.suppress(OSError):  # nothing was written
                os.close(fd)

    def _advise(self, row: int, advice: str) -> None:
        place = self.place(row)
        if _ADVISES and place.kind != "direct":
            length = self._manifest.layout.record_bytes
            with naming(self.file_of(row)):
                os.posix_fadvise(place.fd, place.offset, length, getattr(os, advice))

    def _open_direct(self) -> None:
        """Open the shards once more, past the page cache, where the file system can."""
        if not _O_DIRECT:
            return
        page = mmap.mmap(-1, PAGE_BYTES)  # aligned, as such reads must be
        for shard, fd in enumerate(self.fds):
            try:
                # By its descriptor, so that it is the file that was checked.
                again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | _O_DIRECT)
            except OSError:
                return
            self._direct[shard] = again
            try:
                os.preadv(again, [page], 0)
            except OSError:  # wants another alignment
                os.close(self._direct.pop(shard))
                return

    def _file(self, shard: int) -> Path:
        return self._directory / shard_file(shard, finished=True)
