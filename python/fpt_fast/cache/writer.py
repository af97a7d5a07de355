"""Writing a cache: open, resume, extend or reuse; batches are the unit of commit."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fpt_fast.cache.build import Build, leftovers, remove_leftovers, reopen, start
from fpt_fast.cache.encode import Quantise, RecordMaker, layer_names
from fpt_fast.cache.errors import (
    CacheCorrupt,
    CacheMismatch,
    corrupt,
    differences,
    mismatch,
    refuse_changed_images,
)
from fpt_fast.cache.format import (
    DIGESTS,
    MANIFEST_COPY_FILE,
    MANIFEST_FILE,
    PLAN_FILE,
    Fingerprint,
    Manifest,
    normalised,
    read_manifest,
    recorded_digests,
)
from fpt_fast.cache.layout import RecordLayout, check_keys, default_records_per_shard
from fpt_fast.cache.shards import shard_files, shard_problems
from fpt_fast.cache.storage import DirectoryLock, exists, make_directory, report_full_disk
from fpt_fast.records import SelectedTokens


class CacheWriter:
    """Builds the cache in directory ``path``, one record for each of ``keys``.

    ``fingerprint``: JSON values of all that shaped the features.  What the directory holds
    decides what happens:

    - nothing: a new build;
    - an unfinished build with this layout and fingerprint: it is resumed, and finished records
      are not asked for again.  Keys that it lacks are appended;
    - a finished cache with this layout and fingerprint: it is reused, and where it lacks keys,
      reopened as an unfinished build and extended by them.

    ``digests``: one string per key that changes with the image, so that a cache of images that
    have changed since is refused.  ``notes``: JSON values kept beside the fingerprint, never
    compared; an existing cache keeps its own.  ``records_per_shard``: default as many as fit in
    4 GiB, or what the directory has already.
    ``sync_every``: each ``write`` survives the death of the process; every ``sync_every``-th also
    makes all before it survive a power loss, at the price of waiting for the disk.
    ``quantise``: where ``layout`` is of 8-bit features, what turns f16 keys and values into them.

    Use as a context manager: leaving the block keeps what was written and lets others build; only
    ``finish`` makes a cache that a ``CacheReader`` accepts.

    Raises ``CacheMismatch`` (listing each differing field), ``CacheCorrupt``, ``CacheBusy`` where
    another process is building it, ``CacheFull`` where the disk cannot hold the whole cache, and
    ``ValueError`` for keys that are not unique relative POSIX paths.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layout: RecordLayout,
        fingerprint: Fingerprint,
        keys: Sequence[str],
        *,
        digests: Sequence[str] | None = None,
        notes: Mapping[str, Any] | None = None,
        records_per_shard: int | None = None,
        sync_every: int = 1,
        quantise: Quantise | None = None,
    ) -> None:
        for name, value in (("records_per_shard", records_per_shard), ("sync_every", sync_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if quantise is not None and not layout.has_scales:
            raise ValueError(f"quantise goes with 8-bit features, got a layout of {layout.dtype}")
        self.path = Path(path)
        self.keys = check_keys(keys)
        self.layout = layout
        self.fingerprint = normalised(fingerprint)
        self._notes = normalised(notes or {}, "notes")
        self._digest_of: dict[str, str] = {}
        if digests is not None:
            if len(digests) != len(self.keys):
                raise ValueError(f"digests must be {len(self.keys)}, one a key, got {len(digests)}")
            self._digest_of = dict(zip(self.keys, digests, strict=True))
        self._records_per_shard = records_per_shard
        self._build: Build | None = None
        self._closed = False
        with report_full_disk(
            self.path, layout.record_bytes * len(self.keys), "nothing exists yet"
        ):
            if not self.path.is_dir():
                make_directory(self.path)
        manifest = self._reusable()
        if manifest is None:
            manifest = self._open_locked(sync_every)
        row_of = {key: row for row, key in enumerate(manifest.keys)}
        self._rows = [row_of[key] for key in self.keys]
        names = layer_names(layout, self.fingerprint)
        self._maker = RecordMaker(layout, self.keys, names, quantise)

    def is_done(self, position: int) -> bool:
        """True where the record of ``keys[position]`` is in the cache."""
        return self._build is None or self._rows[position] in self._build.digests

    @property
    def pending(self) -> list[int]:
        """Positions in ``keys`` whose records are still to be written, ascending."""
        return [position for position in range(len(self.keys)) if not self.is_done(position)]

    def write(self, positions: Sequence[int], tokens: SelectedTokens) -> None:
        """Write the records of ``keys[p] for p in positions``; all or, on an error, none counts.

        ``tokens.index`` [B, L, H, K] i32, and ``tokens.kv`` [B, L, 2, H, K, D] f16, bf16, f32 or
        f64 (stored as f16, from which ``quantise`` makes 8 bits), or, in a cache of 8-bit
        features, their dtype with both scales; on any device.  Records that are done already are
        left as they are.  Raises ``FeatureValueError`` naming image and layer for NaN, infinity,
        and values that overflow f16; ``ValueError`` for shapes and dtypes; ``CacheFull``, with
        what was written before intact.
        """
        self.write_beside(positions, tokens, ())

    def write_beside(
        self,
        positions: Sequence[int],
        tokens: SelectedTokens | None,
        others: Iterable[tuple[int, bytes]],
    ) -> None:
        """``write``, and make the records count that ``HelpingWriter.write`` has returned in
        other processes: ``others``; ``tokens`` None: those alone."""
        self._check_positions(positions)
        if tokens is not None:
            self._maker.check(positions, tokens)
        fresh = [b for b, position in enumerate(positions) if not self.is_done(position)]
        theirs = dict(others)
        if self._build is None or not (fresh or theirs):
            return
        records: Iterable[tuple[int, memoryview]] = ()
        if tokens is not None and fresh:
            rows = [self._rows[positions[b]] for b in fresh]
            records = zip(rows, self._maker.make(positions, tokens, fresh), strict=True)
        self._build.commit(records, theirs)

    @property
    def rows(self) -> list[int]:
        """The row of each of ``keys``."""
        return self._rows

    @property
    def owner(self) -> bytes | None:
        """What tells this writer's hold on the directory; None where it builds nothing."""
        return None if self._build is None else self._build.owner

    def finish(self) -> None:
        """Complete the cache and close the writer; raises ``CacheUnfinished`` if records lack."""
        self._check_open()
        if self._build is not None:
            self._build.finish()
            self._build = None
        self._closed = True

    def close(self) -> None:
        """Keep what was written, resumable, and let others build; harmless when called again."""
        self._closed = True
        if self._build is not None:
            self._build.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _reusable(self) -> Manifest | None:
        """The manifest of a finished cache that has every key, and no trace of a killed build."""
        try:
            manifest = read_manifest(self.path / MANIFEST_FILE, "manifest")
        except FileNotFoundError:
            return None
        self._refuse_difference(manifest)
        if not set(self.keys) <= set(manifest.keys) or leftovers(self.path, lock=True):
            return None
        self._refuse_damage(manifest)
        return manifest

    def _open_locked(self, sync_every: int) -> Manifest:
        lock = DirectoryLock(self.path)
        try:
            if exists(self.path / MANIFEST_FILE):
                manifest = read_manifest(self.path / MANIFEST_FILE, "manifest")
                self._refuse_difference(manifest)
                self._refuse_damage(manifest)
                remove_leftovers(self.path)
                if set(self.keys) <= set(manifest.keys):
                    lock.release()
                    return manifest
                reopen(self.path, manifest, range(len(manifest.keys)))
            elif not exists(self.path / PLAN_FILE):
                self._start()
            build = Build(self.path, lock, sync_every=sync_every)
            self._refuse_difference(build.plan)
            self._cover(build)
            build.allocate()
        except BaseException:
            lock.release()
            raise
        self._build = build
        return build.plan

    def _start(self) -> None:
        for file in (self.path / MANIFEST_COPY_FILE, *shard_files(self.path)):
            if exists(file):
                raise corrupt(self.path / MANIFEST_FILE, f"is missing, but {file.name} is there")
        size = self._records_per_shard or default_records_per_shard(self.layout)
        notes = self._with_digests(self._notes, self.keys)
        plan = Manifest(self.layout, self.fingerprint, self.keys, size, notes=notes)
        start(self.path, plan)

    def _cover(self, build: Build) -> None:
        """Make the build's keys cover ours; its own that are pending must be among ours."""
        ours = set(self.keys)
        orphans = [
            build.plan.keys[row] for row in build.missing if build.plan.keys[row] not in ours
        ]
        if orphans:
            shown = ", ".join(map(repr, orphans[:5])) + (", ..." if len(orphans) > 5 else "")
            raise CacheMismatch(
                f"{self.path}: {len(orphans)} images of the unfinished build are not among the "
                f"{len(self.keys)} asked for ({shown}); preload the data set that it was begun "
                "with, or use another --cache directory"
            )
        known = set(build.plan.keys)
        if added := [key for key in self.keys if key not in known]:
            build.extend(added, self._with_digests(build.plan.notes, added))

    def _with_digests(self, notes: dict[str, Any], keys: Sequence[str]) -> dict[str, Any]:
        """``notes`` with the digests of the rows that ``keys`` append."""
        recorded = notes.get(DIGESTS, [])
        if not self._digest_of or (DIGESTS not in notes and notes is not self._notes):
            return notes
        return {**notes, DIGESTS: [*recorded, *(self._digest_of[key] for key in keys)]}

    def _refuse_difference(self, manifest: Manifest) -> None:
        fields = differences(manifest.fingerprint, self.fingerprint)
        fields += differences(
            {"layout": manifest.layout.to_json()}, {"layout": self.layout.to_json()}
        )
        asked = self._records_per_shard
        if asked is not None and asked != manifest.records_per_shard:
            fields.append(("records_per_shard", manifest.records_per_shard, asked))
        if fields:
            raise mismatch(self.path, fields)
        refuse_changed_images(self.path, recorded_digests(manifest), self._digest_of)

    def _refuse_damage(self, manifest: Manifest) -> None:
        if problems := shard_problems(self.path, manifest):
            raise CacheCorrupt(problems[0])

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this CacheWriter is closed; open another one to go on")

    def _check_positions(self, positions: Sequence[int]) -> None:
        self._check_open()
        if len(set(positions)) != len(positions):
            raise ValueError(f"positions must not repeat, got {list(positions)}")
        for position in positions:
            if not 0 <= position < len(self.keys):
                raise ValueError(
                    f"positions must be 0 to {len(self.keys) - 1}, one for each key, got {position}"
                )
