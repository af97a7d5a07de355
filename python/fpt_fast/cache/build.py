"""An unfinished cache on disk: its states, and the steps between them.

A directory is *finished* where ``manifest.fpt`` exists, else *unfinished* where ``plan.fpt``
exists.  Every step below leaves one or the other valid at each instant, so that a kill or a power
loss anywhere costs at most the records of the running ``commit``:

- start:  plan written. Then shards are allocated and filled, and the journal grows.
- finish: copy of the manifest, manifest renamed into place (this is the commit); plan, journal go.
- reopen: journal and plan written, manifest removed (this is the commit); then as after start.
"""

import contextlib
import logging
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fpt_fast.cache.errors import CacheUnfinished, corrupt
from fpt_fast.cache.format import (
    JOURNAL_FILE,
    MANIFEST_COPY_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    Manifest,
    checksum_table,
    decode_journal,
    digest,
    encode_journal_entry,
    encode_manifest,
    read_manifest,
    shard_file,
    shard_header,
)
from fpt_fast.cache.helper import wait_for_helpers
from fpt_fast.cache.layout import PAGE_BYTES
from fpt_fast.cache.shards import find_bad_rows
from fpt_fast.cache.storage import (
    LOCK_FILE,
    TEMPORARY_SUFFIX,
    DirectoryLock,
    exists,
    file_mode,
    is_network_file_system,
    opened,
    preallocate,
    read_optional,
    report_full_disk,
    sync_data,
    sync_directory,
    write_all,
    write_atomic,
    write_temporary,
)

_logger = logging.getLogger("fpt_fast")


class Build:
    """The unfinished cache in ``directory``, whose ``lock`` the caller holds.

    On opening, each journal entry is checked against the record's bytes; ``lost`` are the rows
    whose entry was right and whose bytes were not.
    """

    def __init__(self, directory: Path, lock: DirectoryLock, *, sync_every: int = 1) -> None:
        self.directory = directory
        self.plan = read_manifest(directory / PLAN_FILE, "plan")
        self._lock = lock
        self.owner = lock.owner
        self._sync_every = sync_every
        self._unsynced_commits = 0
        self._unsynced_shards: set[int] = set()
        self._unsynced_rows: set[int] = set()
        self.digests: dict[int, bytes] = {}
        with self._report_full_disk(PAGE_BYTES):
            self._adopt_shards()
        wait_for_helpers(self._partial(shard) for shard in range(self.plan.shard_count))
        claimed = decode_journal(self.plan, read_optional(directory / JOURNAL_FILE))
        self.lost = find_bad_rows(self._partial, self.plan, claimed)
        lost = set(self.lost)
        self.digests = {row: claimed[row] for row in sorted(claimed) if row not in lost}
        # Rewritten, so that it is free of torn entries and a new one has a place to go.
        journal = _encode_journal(self.plan, self.digests.items())
        with self._report_full_disk(len(journal)):
            write_atomic(directory / JOURNAL_FILE, journal)
        self._journal_bytes = len(journal)

    @property
    def missing(self) -> list[int]:
        """Rows without a record."""
        return [row for row in range(len(self.plan.keys)) if row not in self.digests]

    def extend(self, keys: Sequence[str], notes: dict[str, Any]) -> None:
        """Append rows for ``keys``; ``notes`` replace those of the cache."""
        plan = replace(self.plan, keys=(*self.plan.keys, *keys), notes=notes)
        data = encode_manifest(plan)
        with self._report_full_disk(len(data)):
            write_atomic(self.directory / PLAN_FILE, data)
        self.plan = plan

    def allocate(self) -> None:
        """Give every shard its header and its exact size, with disk blocks reserved.

        Raises ``CacheFull`` where the disk cannot hold the whole cache: now, not hours later.
        """
        network = is_network_file_system(self.directory)
        with self._report_full_disk(self._unallocated_bytes()):
            for shard in range(self.plan.shard_count):
                with opened(self._partial(shard), os.O_RDWR | os.O_CREAT) as (fd, size):
                    if size != self.plan.shard_bytes(shard):
                        preallocate(fd, self.plan.shard_bytes(shard), network=network)
                    # Written each time: after a sync that failed, the right bytes may be in
                    # memory alone, and no later sync would write them.
                    write_all(fd, shard_header(self.plan, shard), 0)
                    os.fsync(fd)
            sync_directory(self.directory)

    def commit(
        self, records: Iterable[tuple[int, memoryview]], others: Mapping[int, bytes] | None = None
    ) -> None:
        """Write records, then the journal entries that make them count; see ``sync_every``.

        ``others``: digests of rows that helpers have written, and made durable.

        When this returns, the records survive the death of the process.  They survive a power
        loss too, after every ``sync_every``-th call and after ``close``.
        """
        written = dict(others or {})
        record_bytes = self.plan.layout.record_bytes
        with self._report_full_disk(record_bytes):
            for row, record in records:
                shard, offset = self.plan.locate(row)
                self._unsynced_shards.add(shard)
                with opened(self._partial(shard), os.O_WRONLY) as (fd, _):
                    write_all(fd, record, offset)
                written[row] = digest(record)
            self._unsynced_commits += 1
            due = self._unsynced_commits >= self._sync_every
            if due:
                self._sync_shards()
            entries = _encode_journal(self.plan, written.items())
            with opened(self.directory / JOURNAL_FILE, os.O_WRONLY) as (fd, _):
                # At a position of our own: whatever an interrupted call left there is overwritten.
                write_all(fd, entries, self._journal_bytes)
                if due:
                    sync_data(fd)
        self._journal_bytes += len(entries)
        self.digests.update(written)
        if due:
            self._unsynced_commits = 0
            self._unsynced_rows.clear()
        else:
            self._unsynced_rows.update(written)

    def finish(self) -> Manifest:
        """Turn a complete build into a finished cache; raises ``CacheUnfinished`` if it is not."""
        if missing := self.missing:
            raise CacheUnfinished(
                f"{self.directory}: {len(missing)} of {len(self.plan.keys)} records are missing, "
                f"first {self.plan.keys[missing[0]]!r}; write them before finish()"
            )
        digests = [self.digests[row] for row in range(len(self.plan.keys))]
        manifest = replace(self.plan, checksums=checksum_table(digests))
        data = encode_manifest(manifest)
        with self._report_full_disk(2 * len(data)):
            self._sync_shards()
            self._unsynced_commits = 0
            self._unsynced_rows.clear()
            temporaries = [
                (write_temporary(self.directory / name, data), self.directory / name)
                for name in (MANIFEST_COPY_FILE, MANIFEST_FILE)
            ]
            for shard in range(manifest.shard_count):
                if exists(self._partial(shard)):  # else an earlier, failed finish() got so far
                    self._partial(shard).replace(self.directory / shard_file(shard, finished=True))
            sync_directory(self.directory)
            for temporary, file in temporaries:
                temporary.replace(file)
                # The copy is there for good before the manifest, which ends the build, may be.
                sync_directory(self.directory)
            remove_leftovers(self.directory)
        self._lock.release()
        return manifest

    def close(self) -> None:
        """Make everything that was committed durable, and let others build."""
        try:
            if self._unsynced_commits:
                with self._report_full_disk(self.plan.layout.record_bytes):
                    self._sync_shards()
                    with opened(self.directory / JOURNAL_FILE, os.O_WRONLY) as (fd, _):
                        sync_data(fd)
                self._unsynced_commits = 0
                self._unsynced_rows.clear()
        finally:
            self._lock.release()

    def _sync_shards(self) -> None:
        try:
            for shard in sorted(self._unsynced_shards):
                with opened(self._partial(shard), os.O_WRONLY) as (fd, _):
                    sync_data(fd)
        except OSError:
            self._forget_unsynced()
            raise
        self._unsynced_shards.clear()

    def _forget_unsynced(self) -> None:
        """After a sync that failed: what was written since the last one is to be written again.

        Its bytes can still be read, but the kernel counts them as clean: no later sync would take
        them to the disk.
        """
        for row in self._unsynced_rows:
            self.digests.pop(row, None)
        journal = _encode_journal(self.plan, self.digests.items())
        with contextlib.suppress(OSError):  # the error that led here is the one to report
            write_atomic(self.directory / JOURNAL_FILE, journal)
            self._journal_bytes = len(journal)
        self._unsynced_rows.clear()

    def _partial(self, shard: int) -> Path:
        return self.directory / shard_file(shard, finished=False)

    def _adopt_shards(self) -> None:
        """Bring every shard back to its unfinished name; drop what is no regular file."""
        for shard in range(self.plan.shard_count):
            final = self.directory / shard_file(shard, finished=True)
            for file in (final, self._partial(shard)):
                mode = file_mode(file)
                if mode is None or stat.S_ISREG(mode):
                    continue
                if stat.S_ISDIR(mode):
                    raise corrupt(file, "is a directory; remove it")
                file.unlink()
            if exists(final):
                # Both names exist only where somebody copied files about.
                if exists(self._partial(shard)):
                    final.unlink()
                else:
                    final.rename(self._partial(shard))
        sync_directory(self.directory)

    def _unallocated_bytes(self) -> int:
        needed = 0
        for shard in range(self.plan.shard_count):
            try:
                present = 512 * self._partial(shard).stat().st_blocks
            except FileNotFoundError:
                present = 0
            needed += max(0, self.plan.shard_bytes(shard) - present)
        return needed

    def _report_full_disk(self, needed: int) -> AbstractContextManager[None]:
        state = f"{len(self.digests)} of {len(self.plan.keys)} records are safe"
        return report_full_disk(self.directory, needed, state)


def start(directory: Path, plan: Manifest) -> None:
    """Begin a build in a directory that has none; the caller holds its lock."""
    data = encode_manifest(plan)
    # A journal without a plan tells of records that are not here.
    (directory / JOURNAL_FILE).unlink(missing_ok=True)
    with report_full_disk(directory, len(data), "nothing was written"):
        write_atomic(directory / PLAN_FILE, data)


def reopen(directory: Path, manifest: Manifest, good_rows: Iterable[int]) -> None:
    """Turn a finished cache back into a build that has ``good_rows``; the caller holds its lock."""
    checksums = manifest.checksums
    if checksums is None:
        raise ValueError("reopen needs the manifest of a finished cache, got a plan")
    plan = replace(manifest, checksums=None)
    journal = _encode_journal(plan, ((row, checksums[row].tobytes()) for row in good_rows))
    data = encode_manifest(plan)
    with report_full_disk(directory, len(journal) + len(data), "the cache is as it was"):
        write_atomic(directory / JOURNAL_FILE, journal)
        write_atomic(directory / PLAN_FILE, data)
        (directory / MANIFEST_FILE).unlink()
        sync_directory(directory)
    (directory / MANIFEST_COPY_FILE).unlink(missing_ok=True)


def leftovers(directory: Path, *, lock: bool = False) -> list[Path]:
    """Files of a build that was killed between its commit and its cleaning up.

    With ``lock``, its lock file too.
    """
    names = [PLAN_FILE, JOURNAL_FILE, *([LOCK_FILE] if lock else [])]
    names += [
        name + TEMPORARY_SUFFIX
        for name in (PLAN_FILE, JOURNAL_FILE, MANIFEST_FILE, MANIFEST_COPY_FILE)
    ]
    return [directory / name for name in names if exists(directory / name)]


def remove_leftovers(directory: Path) -> None:
    """Remove ``leftovers`` of a finished cache; the caller holds its lock."""
    with report_full_disk(directory, 1, "the cache is whole"):
        for file in leftovers(directory):
            file.unlink()
        sync_directory(directory)


def _encode_journal(plan: Manifest, digests: Iterable[tuple[int, bytes]]) -> bytes:
    return b"".join(encode_journal_entry(plan, row, value) for row, value in digests)
