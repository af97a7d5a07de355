"""Shards on disk: checked on opening, and record by record."""

import errno
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fpt_fast.cache.errors import CacheCorrupt, CacheUnfinished, corrupt
from fpt_fast.cache.format import (
    MANIFEST_FILE,
    PLAN_FILE,
    Manifest,
    digest,
    read_manifest,
    shard_file,
    shard_header,
)
from fpt_fast.cache.layout import PAGE_BYTES
from fpt_fast.cache.storage import exists, naming, open_regular, opened, read_into


def open_shard(directory: Path, manifest: Manifest, shard: int) -> int:
    """Descriptor of a finished shard whose size and header are what the manifest says.

    Raises ``CacheCorrupt`` where the shard is missing, is no regular file, or differs, and
    ``CacheUnfinished`` where that is so because the cache is being extended or repaired just now.
    """
    try:
        return _open_checked(directory, manifest, shard)
    except CacheCorrupt:
        if is_current(directory, manifest):
            raise
    raise CacheUnfinished(
        f"{directory} changed while it was being opened: it is being extended or repaired; open it "
        "again when that has ended"
    )


def _open_checked(directory: Path, manifest: Manifest, shard: int) -> int:
    file = directory / shard_file(shard, finished=True)
    try:
        fd, size = open_regular(file)
    except FileNotFoundError:
        raise corrupt(file, "is missing") from None
    try:
        expected = manifest.shard_bytes(shard)
        if size != expected:
            raise corrupt(file, f"has {size} bytes, the manifest says {expected}")
        page = bytearray(PAGE_BYTES)
        read_into(fd, memoryview(page), 0)
        if page != shard_header(manifest, shard):
            raise corrupt(file, "has a header that is not the one of this cache and shard")
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_current(directory: Path, manifest: Manifest) -> bool:
    """True unless a builder has removed or replaced the manifest or plan since it was read."""
    unfinished = manifest.checksums is None
    if unfinished and exists(directory / MANIFEST_FILE):
        return False
    try:
        if unfinished:
            now = read_manifest(directory / PLAN_FILE, "plan")
        else:
            now = read_manifest(directory / MANIFEST_FILE, "manifest")
    except FileNotFoundError:
        # Where there is neither, nobody is at work: files are missing.
        return not unfinished and not exists(directory / PLAN_FILE)
    return now.keys == manifest.keys and now.common() == manifest.common()


def shard_problems(directory: Path, manifest: Manifest) -> list[str]:
    """What ``open_shard`` refuses, one sentence per shard."""
    problems = []
    for shard in range(manifest.shard_count):
        try:
            fd = open_shard(directory, manifest, shard)
            with naming(directory / shard_file(shard, finished=True)):
                os.close(fd)
        except (CacheCorrupt, OSError) as error:
            problems.append(str(error))
    return problems


def shard_files(directory: Path) -> list[Path]:
    """Everything in the directory that is named like a shard, finished or not, in name order."""
    return sorted([*directory.glob("shard-*.fpt"), *directory.glob("shard-*.partial")])


def find_bad_rows(
    shard_path: Callable[[int], Path],
    manifest: Manifest,
    digests: Mapping[int, bytes],
    workers: int = 2,
) -> list[int]:
    """Rows among ``digests`` whose record on disk has another digest, or is not there at all."""
    by_shard: dict[int, list[int]] = {}
    for row in sorted(digests):
        by_shard.setdefault(manifest.locate(row)[0], []).append(row)
    bad: list[int] = []
    with ThreadPoolExecutor(max_workers=workers) as pool:
        for shard, rows in by_shard.items():
            try:
                with opened(shard_path(shard)) as (fd, size):
                    check = _RecordCheck(fd, size, manifest)
                    ok = pool.map(lambda row, check=check: check(row) == digests[row], rows)
                    bad += [row for row, good in zip(rows, ok, strict=True) if not good]
            except (CacheCorrupt, FileNotFoundError):
                bad += rows
    return bad


class _RecordCheck:
    """Digest of a row's record as it is on disk; empty where the file ends before it does."""

    def __init__(self, fd: int, size: int, manifest: Manifest) -> None:
        self._fd, self._size, self._manifest = fd, size, manifest
        self._local = threading.local()

    def __call__(self, row: int) -> bytes:
        offset = self._manifest.locate(row)[1]
        # No memory for a record that a manifest claims and the file has no room for.
        if offset + self._manifest.layout.record_bytes > self._size:
            return b""
        # One buffer per thread: records are megabytes, and fresh memory costs page faults.
        if not hasattr(self._local, "buffer"):
            self._local.buffer = memoryview(bytearray(self._manifest.layout.record_bytes))
        buffer = self._local.buffer
        try:
            whole = read_into(self._fd, buffer, offset) == len(buffer)
        except OSError as error:
            if (
                error.errno != errno.EIO
            ):  # a bad sector is a bad record, and not the end of the check
                raise
            return b""
        return digest(buffer) if whole else b""
