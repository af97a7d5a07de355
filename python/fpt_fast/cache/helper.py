"""A process that writes records into a cache that another one builds.

Records lie at fixed offsets, so several processes can write them; the builder alone has the
journal.  A record counts once its helper has made it durable and the builder has its entry on
disk.  A helper outlives its builder by a moment, and another builder may take over meanwhile.  So
it writes only while it holds a shared lock on the shard, and finds its own builder's name in the
directory's lock; the new builder writes its name there, then waits for the shards' locks.
"""

import fcntl
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from fpt_fast.cache.encode import RecordMaker
from fpt_fast.cache.errors import CacheBusy, CacheNotFound
from fpt_fast.cache.format import PLAN_FILE, digest, read_manifest, shard_file
from fpt_fast.cache.storage import (
    LOCK_FILE,
    NO_LOCKS,
    opened,
    read_optional,
    report_full_disk,
    sync_data,
    write_all,
)
from fpt_fast.records import SelectedTokens

# A network file system may show a new file to other machines only after this long.
_PATIENCE_SECONDS = 60.0


class HelpingWriter:
    """Writes records of ``maker``'s keys for the builder that is ``owner``.

    ``rows``: the row of each position that lacks a record.  ``plan``: digest of the builder's
    plan.  Raises ``CacheNotFound`` where the directory does not show it.
    """

    def __init__(
        self, path: Path, maker: RecordMaker, rows: Mapping[int, int], owner: bytes, plan: bytes
    ) -> None:
        self._path, self._maker, self._rows, self._owner = path, maker, rows, owner
        _wait_for_plan(path / PLAN_FILE, plan)
        self._plan = read_manifest(path / PLAN_FILE, "plan")

    def write(self, positions: Sequence[int], tokens: SelectedTokens) -> list[tuple[int, bytes]]:
        """Write the records of ``positions`` that lack one, durably: (row, digest) of each, for
        the builder.

        Raises as ``CacheWriter.write``, and ``CacheBusy`` where another builder took over.
        """
        self._maker.check(positions, tokens)
        fresh = [b for b, position in enumerate(positions) if position in self._rows]
        records = self._maker.make(positions, tokens, fresh) if fresh else iter(())
        rows = [self._rows[positions[b]] for b in fresh]
        written: list[tuple[int, bytes]] = []
        needed = len(rows) * self._plan.layout.record_bytes
        with report_full_disk(self._path, needed, "what was finished is safe"):
            # Zipped once: groupby only looks at the row of each pair.
            pairs = zip(rows, records, strict=True)
            for shard, group in groupby(pairs, key=lambda pair: self._plan.locate(pair[0])[0]):
                file = self._path / shard_file(shard, finished=False)
                # For reading too: some network file systems lend shared locks to readers only.
                with opened(file, os.O_RDWR) as (fd, _):
                    _lock(fd, fcntl.LOCK_SH)
                    self._check_owner()
                    for row, record in group:
                        write_all(fd, record, self._plan.locate(row)[1])
                        written.append((row, digest(record)))
                    sync_data(fd)
        return written

    def _check_owner(self) -> None:
        if read_optional(self._path / LOCK_FILE) != self._owner:
            raise CacheBusy(
                f"{self._path} is no longer built by the process that this one helps "
                f"({self._owner.decode().strip()}); start all of them again"
            )


def wait_for_helpers(shards: Iterable[Path]) -> None:
    """Return once no helper of an earlier builder is writing to a shard, or ever will.

    The caller holds the directory's lock.
    """
    for shard in shards:
        try:
            with opened(shard, os.O_RDWR) as (fd, _):
                _lock(fd, fcntl.LOCK_EX)
        except FileNotFoundError:
            continue


def plan_digest(directory: Path) -> bytes:
    """Digest of the plan of the build in ``directory``."""
    return digest(read_optional(directory / PLAN_FILE))


def _wait_for_plan(file: Path, plan: bytes) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while digest(read_optional(file)) != plan:
        if time.monotonic() > deadline:
            raise CacheNotFound(
                f"{file} is not the one that rank 0 has written: the cache must be in a directory "
                "that all machines share"
            )
        time.sleep(0.1)


def _lock(fd: int, kind: int) -> None:
    """Wait for a lock until ``fd`` is closed; where the file system has none, do without."""
    try:
        fcntl.flock(fd, kind)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
