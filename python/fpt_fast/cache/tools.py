"""What people do with a cache: forecast its size, look at it, check it, repair it."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fpt_fast.cache.build import Build, leftovers, remove_leftovers, reopen
from fpt_fast.cache.errors import (
    CacheCorrupt,
    CacheMismatch,
    CacheUnfinished,
    repair_command,
)
from fpt_fast.cache.format import (
    DIGESTS,
    FORMAT_VERSION,
    JOURNAL_FILE,
    MANIFEST_COPY_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    Manifest,
    decode_journal,
    encode_manifest,
    read_manifest,
    shard_file,
)
from fpt_fast.cache.layout import PAGE_BYTES, RecordLayout, default_records_per_shard
from fpt_fast.cache.reader import open_manifest
from fpt_fast.cache.shards import find_bad_rows, is_current, shard_files, shard_problems
from fpt_fast.cache.storage import (
    DirectoryLock,
    exists,
    free_bytes,
    read_optional,
    report_full_disk,
    write_atomic,
)
from fpt_fast.words import counted, format_bytes


@dataclass(frozen=True, slots=True)
class Forecast:
    """Disk space of a cache before it is built.

    ``bytes_total`` for all records; ``bytes_present`` of these are on the disk already (a build
    to be resumed); ``bytes_needed`` remain, of ``bytes_free`` that the disk has.
    """

    path: Path
    images: int
    bytes_total: int
    bytes_present: int
    bytes_free: int

    @property
    def bytes_needed(self) -> int:
        """Bytes that are still to be allocated."""
        return max(0, self.bytes_total - self.bytes_present)

    @property
    def fits(self) -> bool:
        """True where the disk has room."""
        return self.bytes_needed <= self.bytes_free

    def __str__(self) -> str:
        present = (
            f", {format_bytes(self.bytes_present)} of it there already"
            if self.bytes_present
            else ""
        )
        verdict = "" if self.fits else ": too little; make room, or use another --cache directory"
        return (
            f"the cache of {counted(self.images, 'image')} takes "
            f"{format_bytes(self.bytes_total)}{present}; "
            f"{format_bytes(self.bytes_free)} are free at {self.path}{verdict}"
        )


def forecast(layout: RecordLayout, count: int, path: str | os.PathLike[str]) -> Forecast:
    """How much disk a cache of ``count`` images takes at ``path``, and what is free there."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    directory = Path(path)
    shards = -(-count // default_records_per_shard(layout))
    return Forecast(
        path=directory,
        images=count,
        bytes_total=count * layout.record_bytes + shards * PAGE_BYTES,
        bytes_present=sum(
            512 * file.lstat().st_blocks for file in shard_files(directory) if file.is_file()
        ),
        bytes_free=free_bytes(directory),
    )


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What a cache is, and what is wrong with it.

    ``done`` of ``records`` are written (all, where ``state`` is finished).  ``bad_keys`` name the
    images whose records are not what was written; ``problems`` say what else is wrong.  Both are
    empty unless the cache was verified.
    """

    path: Path
    state: Literal["finished", "unfinished"]
    layout: RecordLayout
    fingerprint: dict[str, Any]
    notes: dict[str, Any]
    records: int
    done: int
    shards: int
    records_per_shard: int
    bytes_on_disk: int
    verified: bool = False
    bad_keys: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True where nothing wrong was found."""
        return not self.bad_keys and not self.problems

    def __str__(self) -> str:
        layout = self.layout
        lines = [
            f"{self.path}: {self.state} feature cache, format version {FORMAT_VERSION}",
            f"records:     {self.done} of {self.records}, {format_bytes(layout.record_bytes)} each",
            f"shards:      {self.shards}, at most {self.records_per_shard} records each",
            f"on disk:     {format_bytes(self.bytes_on_disk)}",
            f"layout:      {layout.layers} layers, {layout.heads} heads, {layout.kept} kept tokens "
            f"per head, head width {layout.head_width}, {layout.dtype}",
            "fingerprint:",
            *(f"  {name}: {value}" for name, value in sorted(self.fingerprint.items())),
            *(
                f"note:        {name}: {value}"
                for name, value in sorted(self.notes.items())
                if name != DIGESTS
            ),
        ]
        if self.verified and self.ok:
            what = "every byte" if self.done == self.records else "every byte of what is there"
            lines.append(f"verified:    {what} is as it was written")
        lines += [f"problem:     {problem}" for problem in self.problems]
        if self.bad_keys:
            lines.append(f"bad records: {len(self.bad_keys)}")
            lines += [f"  {key!r}" for key in self.bad_keys[:20]]
            if len(self.bad_keys) > 20:
                lines.append(f"  ... and {len(self.bad_keys) - 20} more")
        if not self.ok:
            command = repair_command(self.path, str(self.notes.get("source") or "BACKBONE"))
            lines.append(
                f"run {command} with the data and backbone that it was preloaded from: it rebuilds "
                "only what is bad"
            )
        return "\n".join(lines)


def inspect_cache(path: str | os.PathLike[str]) -> CacheReport:
    """Describe a finished or unfinished cache without reading its records.

    Raises ``CacheNotFound``, ``CacheCorrupt`` or ``CacheMismatch`` where that cannot be said.
    """
    return _inspect(Path(path))[0]


def verify_cache(path: str | os.PathLike[str], workers: int = 2) -> CacheReport:
    """Check every byte: checksums of all records, headers, sizes, both manifests.

    A builder may be at work meanwhile: what it changes is looked at again.  Raises as
    ``inspect_cache`` does; everything else that is wrong is in the report.
    """
    directory = Path(path)
    while True:
        try:
            report, manifest = _verify(directory, workers)
        except CacheUnfinished:  # it began to be extended or repaired just now
            continue
        if report.ok or is_current(directory, manifest):
            return report


def _verify(directory: Path, workers: int) -> tuple[CacheReport, Manifest]:
    report, manifest = _inspect(directory)
    problems: list[str] = []
    if manifest.checksums is not None:
        digests = {row: manifest.checksums[row].tobytes() for row in range(report.records)}
        problems += shard_problems(directory, manifest)
        problems += _copy_problems(directory)
        problems += _surplus_problems(directory, manifest)
    else:
        digests = decode_journal(manifest, read_optional(directory / JOURNAL_FILE))
    finished = report.state == "finished"
    bad = find_bad_rows(_shard_paths(directory, finished), manifest, digests, workers)
    bad_keys = tuple(manifest.keys[row] for row in bad)
    report = replace(report, verified=True, bad_keys=bad_keys, problems=tuple(problems))
    return report, manifest


def drop_bad_records(path: str | os.PathLike[str], workers: int = 2) -> list[str]:
    """Repair a cache as far as it goes without its images; return the keys of records now pending.

    A cache with bad records becomes an unfinished one, in which only these are to be written: the
    next preload does.  A damaged manifest is restored from its copy; damaged shard headers, wrong
    sizes and leftovers are mended at once.  Raises ``CacheCorrupt`` where both manifests are lost
    (delete the directory and preload again), and ``CacheBusy``, ``CacheFull``, ``CacheNotFound``.
    """
    directory = Path(path)
    if not directory.is_dir():
        open_manifest(directory)  # raises, and says that there is nothing
    lock = DirectoryLock(directory)
    try:
        _restore_manifest(directory)
        bad: list[int] = []
        if exists(directory / MANIFEST_FILE):
            manifest, checksums = open_manifest(directory)
            remove_leftovers(directory)
            digests = {row: checksums[row].tobytes() for row in range(len(manifest.keys))}
            bad = find_bad_rows(_shard_paths(directory, True), manifest, digests, workers)
            if not bad and not shard_problems(directory, manifest):
                return []
            reopen(directory, manifest, sorted(set(digests).difference(bad)))
        elif not exists(directory / PLAN_FILE):
            open_manifest(directory)  # raises, and says what is missing
        build = Build(directory, lock)
        if build.missing:
            build.close()
        else:
            build.allocate()
            build.finish()
        return [build.plan.keys[row] for row in sorted({*bad, *build.lost})]
    finally:
        lock.release()


def _shard_paths(directory: Path, finished: bool) -> Callable[[int], Path]:
    def path(shard: int) -> Path:
        final = directory / shard_file(shard, finished=True)
        partial = directory / shard_file(shard, finished=False)
        # A build that was killed while it finished has shards of both names.
        return final if finished or not exists(partial) else partial

    return path


def _inspect(directory: Path) -> tuple[CacheReport, Manifest]:
    try:
        manifest, _ = open_manifest(directory)
        done = len(manifest.keys)
    except CacheUnfinished:
        manifest = read_manifest(directory / PLAN_FILE, "plan")
        done = len(decode_journal(manifest, read_optional(directory / JOURNAL_FILE)))
    report = CacheReport(
        path=directory,
        state="unfinished" if manifest.checksums is None else "finished",
        layout=manifest.layout,
        fingerprint=manifest.fingerprint,
        notes=manifest.notes,
        records=len(manifest.keys),
        done=done,
        shards=manifest.shard_count,
        records_per_shard=manifest.records_per_shard,
        bytes_on_disk=_bytes_on_disk(directory),
    )
    return report, manifest


def _bytes_on_disk(directory: Path) -> int:
    total = 0
    for file in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a builder renames and removes files
            total += 512 * file.lstat().st_blocks
    return total


def _copy_problems(directory: Path) -> list[str]:
    copy = directory / MANIFEST_COPY_FILE
    if not exists(copy):
        return [f"{copy}: is missing"]
    differs = _differs(copy, read_optional(directory / MANIFEST_FILE))
    return [f"{copy}: is not equal to {MANIFEST_FILE}"] if differs else []


def _surplus_problems(directory: Path, manifest: Manifest) -> list[str]:
    expected = {shard_file(shard, finished=True) for shard in range(manifest.shard_count)}
    surplus = [file for file in shard_files(directory) if file.name not in expected]
    return [f"{file}: is no shard of this cache; remove it" for file in surplus] + [
        f"{file}: is left over from a killed build" for file in leftovers(directory)
    ]


def _restore_manifest(directory: Path) -> None:
    """Make manifest and copy equal, from the one that is whole; leave an unfinished cache alone."""
    manifest, copy = directory / MANIFEST_FILE, directory / MANIFEST_COPY_FILE
    if not exists(manifest) and exists(directory / PLAN_FILE):
        return
    try:
        whole, other = read_manifest(manifest, "manifest"), copy
    except (CacheCorrupt, CacheMismatch, FileNotFoundError) as error:
        try:
            whole, other = read_manifest(copy, "manifest"), manifest
        except (CacheCorrupt, CacheMismatch, FileNotFoundError):
            if isinstance(error, FileNotFoundError):
                return
            raise CacheCorrupt(
                f"{manifest} and its copy are both unreadable ({error}); delete {directory} and "
                "preload again"
            ) from error
    data = encode_manifest(whole)
    if _differs(other, data):
        with report_full_disk(directory, len(data), "the cache is as it was"):
            write_atomic(other, data)


def _differs(file: Path, data: bytes) -> bool:
    try:
        return read_optional(file) != data
    except CacheCorrupt:  # a link, say
        return True
