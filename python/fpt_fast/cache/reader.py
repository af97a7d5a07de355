"""Reading a finished cache: copies of records, or the records themselves where they are mapped."""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
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
from fpt_fast.cache.fetch import Place, make_fetch
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
)
from fpt_fast.cache.layout import RecordLayout
from fpt_fast.cache.memory import BufferPool, allocate_tokens, memory_limit, token_bytes
from fpt_fast.cache.shards import shard_files
from fpt_fast.cache.sources import Sources
from fpt_fast.cache.storage import exists, is_network_file_system, read_optional
from fpt_fast.cache.view import map_records, viewed_tokens
from fpt_fast.records import SelectedTokens

ReadMode = Literal["auto", "mmap", "pread"]
READ_MODES: tuple[ReadMode, ...] = ("auto", "mmap", "pread")


# A directory has a plan or a manifest at each instant, but not at any two: a builder that ended
# between a look at one and at the other must not make a sound cache look damaged.
_LOOKS = 4


class CacheReader:
    """Features of a finished cache, by row; rows are numbered in the order of ``keys``.

    ``read`` copies records by ``pread``; ``view`` shows them where they are, in mapped files.
    ``expect``: the fingerprint that the cache must have, if any.  ``mode``: ``"mmap"`` allows
    views, ``"pread"`` maps nothing, and ``"auto"`` maps what is on a local disk and fits in
    ``memory_share`` of the memory that the process may take; on network file systems a page that
    cannot be fetched would kill the process.  ``verify``: check each record against its checksum,
    on every read, and in a view when it is first shown.  ``threads``: how many records one
    ``read`` takes at a time.

    Of a cache larger than ``memory_share``, as many records as fit in it stay in the page cache,
    always the same ones; the others are read past it (O_DIRECT, or dropped from it once they are
    read), so that memory stays flat and a shuffled epoch finds as much of it in memory as it can.

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
        memory_share: float = 0.5,
    ) -> None:
        if mode not in READ_MODES:
            raise ValueError(f"mode must be one of {', '.join(READ_MODES)}, got {mode!r}")
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if not 0 <= memory_share <= 1:
            raise ValueError(f"memory_share must be 0 to 1, got {memory_share}")
        self.path = Path(path).absolute()
        self._arguments = {
            **{"expect": expect, "mode": mode, "verify": verify, "threads": threads},
            "memory_share": memory_share,
        }
        self._manifest, self._checksums = open_manifest(self.path)
        if expect is not None and (
            fields := differences(self._manifest.fingerprint, normalised(expect))
        ):
            raise mismatch(self.path, fields)
        self._verify = verify
        self._row_of = {key: row for row, key in enumerate(self.keys)}
        self._buffers = BufferPool()
        self._fetch = make_fetch(self.layout, threads)
        self._view: SelectedTokens | None = None
        self._mapped: NDArray[np.uint8] | None = None
        self._checked = np.zeros(len(self), np.bool_)
        self._shared: Tensor | None = None
        self._read_once = np.zeros(len(self), np.bool_)
        self._sources = Sources(
            self.path,
            self._manifest,
            resident=int(memory_share * memory_limit()) // self.layout.record_bytes,
            direct=self._fetch.native,
        )
        try:
            self.mode: ReadMode = self._map(mode)
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

    def read(self, rows: Sequence[int], *, out: SelectedTokens | None = None) -> SelectedTokens:
        """Copies of records: ``kv`` [B, L, 2, H, K, D] of the layout's dtype, ``index``
        [B, L, H, K] i32, and of 8-bit features the scales; with ``out``, in its memory.

        Rows may repeat and come in any order.  Raises ``CacheCorrupt`` naming file and key where
        a record is not what was written, ``IndexError`` for a row that is not there, and
        ``ValueError`` for an ``out`` that these records do not fill.
        """
        wanted = [self._check_row(row) for row in rows]
        self._sources.check_sizes(wanted)
        if out is None:
            buffer = self._buffers.take(token_bytes(self.layout, len(wanted)))
            out = allocate_tokens(self.layout, len(wanted), buffer)
        else:
            self._check_out(out, len(wanted))
        if not wanted:
            return out
        self._sources.announce(wanted)
        places = [self._place(row) for row in wanted]
        results = self._fetch(places, out, digests=self._verify, mapped=self._shared)
        for row, fetched in zip(wanted, results, strict=True):
            if fetched.count < self.layout.record_bytes:
                raise corrupt(
                    self._sources.file_of(row), f"ends inside the record of {self.keys[row]!r}"
                )
            if self._verify:
                self._check_digest(row, fetched.digest)
            self._read_once[row] = True
        self._sources.done(wanted)
        return out

    def view(self, rows: Sequence[int] | None = None) -> SelectedTokens | None:
        """The records themselves: tensors [M, ...] as ``read`` gives them, over the mapped files.

        Row *i* of each is row *i* of the cache, whatever number of shards it has.  With
        ``verify``, those of ``rows`` (None: all) are checked when they are first shown; the
        others must not be looked at.  None where the cache is read by ``pread``.  Writing to a
        view changes private copies of pages in memory, never the file.  It stays valid after
        ``close``.  Raises as ``read`` does.
        """
        if self._mapped is None:
            self._sources.check_sizes(())
            return None
        wanted = range(len(self)) if rows is None else [self._check_row(row) for row in rows]
        self._sources.check_sizes(wanted)
        if self._verify:
            for row in wanted:
                if not self._checked[row]:
                    self._check_digest(row, digest(self._mapped[row].data))
                    # Pages of a cache that does not fit in memory come from the disk again.
                    self._checked[row] = self._sources.fits
        if self._view is None:
            self._view = viewed_tokens(self._mapped, self.layout.parts)
        return self._view

    def announce(self, rows: Iterable[int]) -> None:
        """Tell the kernel what will be read soon, in this order, so that the disk works ahead."""
        self._sources.announce([self._check_row(row) for row in rows])

    def close(self) -> None:
        """Release files; harmless when called again.  Views stay valid."""
        self._fetch.close()
        self._view = self._mapped = self._shared = None
        self._sources.close()

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
        if hasattr(self, "_sources"):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (str(self.path), self._arguments)

    def _check_row(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"rows must be 0 to {len(self) - 1}, got {int(row)}")
        return int(row)

    def _map(self, mode: ReadMode) -> ReadMode:
        """Map the records as ``mode`` wants it; returns what was done."""
        if mode == "auto" and (not self._sources.fits or is_network_file_system(self.path)):
            mode = "pread"
        if mode != "pread":
            try:
                self._mapped = map_records(self._sources.fds, self._manifest)
                if self._fetch.native and self._sources.fits:
                    # A map of its own, since a user may have written to the view.
                    shared = map_records(self._sources.fds, self._manifest, writable=False)
                    self._shared = torch.from_numpy(shared).view(-1)
            except OSError as error:
                if mode == "mmap":
                    raise OSError(
                        error.errno, f"{self.path}: {error.strerror}; use mode='pread'"
                    ) from error
                return "pread"
            return "mmap"
        return mode

    def _place(self, row: int) -> Place:
        """In the file, so that a bad disk is an error; then, once it is in memory, in a map.

        From a map a record is checked and copied in one pass, faster than it is read.
        """
        if self._shared is not None and self._read_once[row]:
            return Place(-1, row * self.layout.record_bytes, "map")
        return self._sources.place(row)

    def _check_out(self, out: SelectedTokens, images: int) -> None:
        for part in self.layout.parts:
            tensor, shape = getattr(out, part.name), (images, *part.shape)
            dtype = getattr(torch, part.dtype)
            if (
                tensor is None
                or (tuple(tensor.shape), tensor.dtype) != (shape, dtype)
                or tensor.device.type != "cpu"
                or not tensor.is_contiguous()
            ):
                got = "None" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
                raise ValueError(
                    f"out.{part.name} must be {shape} of {dtype}, contiguous on the CPU, got {got}"
                )

    def _check_digest(self, row: int, value: bytes) -> None:
        if value != self._checksums[row].tobytes():
            raise corrupt(
                self._sources.file_of(row),
                f"the record of {self.keys[row]!r} (row {row}) does not match its checksum",
            )


def open_manifest(directory: Path) -> tuple[Manifest, NDArray[np.uint8]]:
    """Manifest and checksums u8 [M, 16] of a finished cache.

    Raises ``CacheUnfinished``, ``CacheNotFound``, ``CacheCorrupt`` or ``CacheMismatch``.
    """
    for _ in range(_LOOKS):
        # Seen first: a build that begins after this look is not a damaged cache.
        begun = exists(directory / MANIFEST_COPY_FILE) or bool(shard_files(directory))
        try:
            manifest = read_manifest(directory / MANIFEST_FILE, "manifest")
        except FileNotFoundError:
            reason = _why_no_manifest(directory, begun)
            if isinstance(reason, CacheUnfinished):
                raise reason from None
            continue
        if manifest.checksums is None:
            raise corrupt(directory / MANIFEST_FILE, "has no checksums")
        return manifest, manifest.checksums
    raise reason


def _why_no_manifest(directory: Path, begun: bool) -> Exception:
    """``begun``: whether shards or a copy of the manifest had been there before the manifest was
    looked for."""
    with contextlib.suppress(FileNotFoundError):
        plan = read_manifest(directory / PLAN_FILE, "plan")
        done = len(decode_journal(plan, read_optional(directory / JOURNAL_FILE)))
        return CacheUnfinished(
            f"{directory} is unfinished: {done} of {len(plan.keys)} records; run preload again to "
            "resume"
        )
    if begun:
        return corrupt(directory / MANIFEST_FILE, "is missing")
    return CacheNotFound(f"{directory} has no feature cache; run `fpt-fast preload` to make one")


def _open_again(path: str, arguments: dict[str, Any]) -> CacheReader:
    return CacheReader(path, **arguments)
