"""Reading a finished cache: by memory map or by ``pread``, each record checked on the way."""

import contextlib
import mmap
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpt_fast.cache.errors import (
    CacheKeyError,
    CacheNotFound,
    CacheUnfinished,
    corrupt,
    differences,
    mismatch,
    refuse_changed_images,
)
from fpt_fast.cache.format import (
    JOURNAL_FILE,
    MANIFEST_COPY_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    Fingerprint,
    Manifest,
    decode_journal,
    digest,
    normalised,
    read_manifest,
    recorded_digests,
    shard_file,
)
from fpt_fast.cache.layout import PAGE_BYTES, RecordLayout
from fpt_fast.cache.shards import open_shard, shard_files
from fpt_fast.cache.storage import is_network_file_system, read_into, read_optional
from fpt_fast.records import SelectedTokens

ReadMode = Literal["auto", "mmap", "pread"]
READ_MODES: tuple[ReadMode, ...] = ("auto", "mmap", "pread")

# Linux's value where Python does not name it (before 3.13): no swap is set aside for the map.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


class CacheReader:
    """Features of a finished cache, by row; rows are numbered in the order of ``keys``.

    ``expect``: the fingerprint that the cache must have, if any.  ``mode``: ``"mmap"``,
    ``"pread"``, or ``"auto"``: pread on network file systems, where a page that cannot be fetched
    would kill the process.  ``verify``: check each record against its checksum on every read.
    ``threads``: how many records one ``read`` takes at a time.

    Safe to use from several threads, after a fork, and to pickle (the copy opens the files
    again).  Raises ``CacheNotFound``, ``CacheUnfinished``, ``CacheMismatch``, ``CacheCorrupt``.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        expect: Fingerprint | None = None,
        mode: ReadMode = "auto",
        verify: bool = True,
        threads: int = 1,
    ) -> None:
        if mode not in READ_MODES:
            raise ValueError(f"mode must be one of {', '.join(READ_MODES)}, got {mode!r}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.path = Path(path).absolute()
        self._arguments = {"expect": expect, "mode": mode, "verify": verify, "threads": threads}
        self._manifest, self._checksums = open_manifest(self.path)
        if expect is not None and (
            fields := differences(self._manifest.fingerprint, normalised(expect))
        ):
            raise mismatch(self.path, fields)
        if mode == "auto":
            mode = "pread" if is_network_file_system(self.path) else "mmap"
        self.mode: ReadMode = mode
        self._verify = verify
        self._threads = threads
        self._row_of = {key: row for row, key in enumerate(self.keys)}
        self._pool: tuple[int, ThreadPoolExecutor] | None = None
        self._view: Tensor | None = None
        self._fds: list[int] = []
        self._maps: list[mmap.mmap] = []
        try:
            for shard in range(self._manifest.shard_count):
                fd = open_shard(self.path, self._manifest, shard)
                if mode == "pread":
                    self._fds.append(fd)
                    continue
                try:
                    size = self._manifest.shard_bytes(shard)
                    self._maps.append(mmap.mmap(fd, size, access=mmap.ACCESS_READ))
                finally:  # the map keeps a descriptor of its own
                    os.close(fd)
        except BaseException:
            self.close()
            raise

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the images, by row."""
        return self._manifest.keys

    @property
    def layout(self) -> RecordLayout:
        """Shape of a record."""
        return self._manifest.layout

    @property
    def notes(self) -> dict[str, Any]:
        """What the maker noted beside the fingerprint."""
        return self._manifest.notes

    def require_images(self, digests: Mapping[str, str]) -> None:
        """Raise ``CacheMismatch`` where an image (digest by key) is not the one preloaded."""
        refuse_changed_images(self.path, recorded_digests(self._manifest), digests)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What shaped the features, as JSON values."""
        return self._manifest.fingerprint

    def __len__(self) -> int:
        return len(self.keys)

    def row(self, key: str) -> int:
        """Row of an image; raises ``CacheKeyError`` (a ``KeyError``) where the cache lacks it."""
        try:
            return self._row_of[key]
        except KeyError:
            raise CacheKeyError(
                f"{self.path} has no features of {key!r} among its {len(self)} images; preload "
                "this data set into it to add them"
            ) from None

    def read(self, rows: Sequence[int]) -> SelectedTokens:
        """Copies of records: ``kv`` [B, L, 2, H, K, D] f16 and ``index`` [B, L, H, K] i32.

        Rows may repeat and come in any order.  Raises ``CacheCorrupt`` naming file and key where
        a record is not what was written, and ``IndexError`` for a row that is not there.
        """
        wanted = [self._check_row(row) for row in rows]
        self._check_sizes({self._manifest.locate(row)[0] for row in wanted})
        kv = torch.empty((len(wanted), *self.layout.kv_shape), dtype=torch.float16)
        index = torch.empty((len(wanted), *self.layout.index_shape), dtype=torch.int32)
        if not wanted:
            return SelectedTokens(kv, index)
        kv_bytes = kv.numpy().reshape(len(wanted), -1).view(np.uint8)
        index_bytes = index.numpy().reshape(len(wanted), -1).view(np.uint8)
        self._announce(wanted)
        read_one = self._copy_mapped if self.mode == "mmap" else self._copy_read

        def fill(b: int) -> None:
            read_one(wanted[b], kv_bytes[b], index_bytes[b])

        self._each(fill, range(len(wanted)))
        return SelectedTokens(kv, index)

    def kv_view(self) -> Tensor | None:
        """All keys and values, [M, L, 2, H, K, D] f16, as a strided view of the mapped file.

        None where the cache has several shards, or is read by ``pread``.  With ``verify``, every
        record is checked on the first call.  Writing to the view changes private copies of pages
        in memory, never the file.  The view stays valid after ``close``.
        """
        if self.mode != "mmap" or self._manifest.shard_count != 1:
            return None
        self._check_sizes({0})
        if self._view is None:
            if self._verify:
                self._each(self._check_mapped, range(len(self)))
            fd = open_shard(self.path, self._manifest, 0)
            try:
                mapped = mmap.mmap(
                    fd,
                    self._manifest.shard_bytes(0),
                    flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            finally:
                os.close(fd)
            self._view = torch.from_numpy(_strided(mapped, len(self), self.layout))
        return self._view

    def close(self) -> None:
        """Release files and maps; harmless when called again."""
        if self._pool is not None and self._pool[0] == os.getpid():
            self._pool[1].shutdown()
        self._pool, self._view = None, None
        for mapped in self._maps:
            # A read in another thread keeps its map; it goes when that read ends.
            with contextlib.suppress(BufferError):
                mapped.close()
        for fd in self._fds:
            os.close(fd)
        self._maps, self._fds = [], []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_maps"):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (str(self.path), self._arguments)

    def _check_row(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"rows must be 0 to {len(self) - 1}, got {int(row)}")
        return int(row)

    def _check_sizes(self, shards: Iterable[int]) -> None:
        """Raise where a shard has become shorter: reading its map would kill the process."""
        if not self._fds and not self._maps:
            raise ValueError("this CacheReader is closed; open another one")
        for shard in shards:
            mapped = self.mode == "mmap"
            size = self._maps[shard].size() if mapped else os.fstat(self._fds[shard]).st_size
            expected = self._manifest.shard_bytes(shard)
            if size < expected:
                raise corrupt(self._file(shard), f"has {size} bytes, was opened with {expected}")

    def _file(self, shard: int) -> Path:
        return self.path / shard_file(shard, finished=True)

    def _announce(self, rows: Sequence[int]) -> None:
        """Tell the kernel what is about to be read, so that the disk works ahead of us."""
        for row in rows:
            shard, offset = self._manifest.locate(row)
            start = offset - offset % mmap.PAGESIZE
            length = offset + self.layout.record_bytes - start
            if self.mode == "mmap":
                self._maps[shard].madvise(mmap.MADV_WILLNEED, start, length)
            elif hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._fds[shard], start, length, os.POSIX_FADV_WILLNEED)

    def _each(self, work: Callable[[int], None], items: Iterable[int]) -> None:
        """Run ``work`` on each item, in ``threads`` threads."""
        if self._threads == 1:
            for item in items:
                work(item)
            return
        # The threads of a pool do not survive a fork; a pool belongs to one process.
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (os.getpid(), ThreadPoolExecutor(self._threads))
        for _ in self._pool[1].map(work, items):
            pass

    def _copy_mapped(self, row: int, kv: NDArray[np.uint8], index: NDArray[np.uint8]) -> None:
        record = self._mapped_record(row)
        if self._verify:
            self._check_digest(row, digest(record.data))
        kv[:] = record[: len(kv)]
        index[:] = record[len(kv) : len(kv) + len(index)]

    def _copy_read(self, row: int, kv: NDArray[np.uint8], index: NDArray[np.uint8]) -> None:
        shard, offset = self._manifest.locate(row)
        padding = np.empty(self.layout.record_bytes - self.layout.payload_bytes, np.uint8)
        for part in (kv, index, padding):
            if read_into(self._fds[shard], part.data, offset) < len(part):
                raise corrupt(self._file(shard), f"ends inside the record of {self.keys[row]!r}")
            offset += len(part)
        if self._verify:
            self._check_digest(row, digest(kv.data, index.data, padding.data))

    def _check_mapped(self, row: int) -> None:
        self._check_digest(row, digest(self._mapped_record(row).data))

    def _mapped_record(self, row: int) -> NDArray[np.uint8]:
        shard, offset = self._manifest.locate(row)
        return np.frombuffer(self._maps[shard], np.uint8, self.layout.record_bytes, offset)

    def _check_digest(self, row: int, value: bytes) -> None:
        if value != self._checksums[row].tobytes():
            raise corrupt(
                self._file(self._manifest.locate(row)[0]),
                f"the record of {self.keys[row]!r} (row {row}) does not match its checksum",
            )


def open_manifest(directory: Path) -> tuple[Manifest, NDArray[np.uint8]]:
    """Manifest and checksums u8 [M, 16] of a finished cache.

    Raises ``CacheUnfinished``, ``CacheNotFound``, ``CacheCorrupt`` or ``CacheMismatch``.
    """
    try:
        manifest = read_manifest(directory / MANIFEST_FILE, "manifest")
    except FileNotFoundError:
        raise _why_no_manifest(directory) from None
    if manifest.checksums is None:
        raise corrupt(directory / MANIFEST_FILE, "has no checksums")
    return manifest, manifest.checksums


def _why_no_manifest(directory: Path) -> Exception:
    if (directory / PLAN_FILE).exists():
        plan = read_manifest(directory / PLAN_FILE, "plan")
        done = len(decode_journal(plan, read_optional(directory / JOURNAL_FILE)))
        return CacheUnfinished(
            f"{directory} is unfinished: {done} of {len(plan.keys)} records; run preload again to "
            "resume"
        )
    if (directory / MANIFEST_COPY_FILE).exists() or shard_files(directory):
        return corrupt(directory / MANIFEST_FILE, "is missing")
    return CacheNotFound(f"{directory} has no feature cache; run `fpt-fast preload` to make one")


def _strided(mapped: mmap.mmap, records: int, layout: RecordLayout) -> NDArray[np.float16]:
    """The kv part of every record, [M, L, 2, H, K, D], over the mapped shard."""
    item = np.dtype("<f2").itemsize
    strides = [item]
    for axis in reversed(layout.kv_shape[1:]):
        strides.insert(0, strides[0] * axis)
    return np.ndarray(
        (records, *layout.kv_shape), "<f2", mapped, PAGE_BYTES, (layout.record_bytes, *strides)
    )


def _open_again(path: str, arguments: dict[str, Any]) -> CacheReader:
    return CacheReader(path, **arguments)
