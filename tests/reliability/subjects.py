"""The caches under attack: small, of every dtype that the format has, and always the same bytes.

What a sound read of a key gives is taken from a cache that was built in one go without trouble,
so that nothing here knows how a dtype is encoded.
"""

import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from cache.samples import FINGERPRINT, LAYOUTS, all_bytes, build_cache, flip, keys, tokens

from fpt_fast.cache import CacheReader, CacheWriter, RecordLayout, drop_bad_records
from fpt_fast.cache.layout import DTYPES
from fpt_fast.records import SelectedTokens

DTYPE_NAMES = tuple(DTYPES)
MODES = ("mmap", "pread")
PER_SHARD, SMALL, LARGE = 3, 5, 8


class Broken(AssertionError):
    """A promise of the cache that did not hold."""


def same(left: SelectedTokens, right: SelectedTokens) -> bool:
    """True where every tensor of two records of features is bit-equal."""
    for name in left.__dataclass_fields__:
        a, b = getattr(left, name), getattr(right, name)
        if (a is None) != (b is None):
            return False
        # By bytes, since torch does not compare float8.
        if a is not None and not torch.equal(
            a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
        ):
            return False
    return True


def rows_of(tokens: SelectedTokens, first: int, count: int = 1) -> SelectedTokens:
    """Records ``first`` and after of a batch."""
    named = ((name, getattr(tokens, name)) for name in tokens.__dataclass_fields__)
    return SelectedTokens(
        **{name: None if value is None else value[first : first + count] for name, value in named}
    )


@dataclass(frozen=True)
class Subject:
    """Sound caches of one dtype below ``root``, and what reading them gives."""

    root: Path
    dtype: str

    @property
    def layout(self) -> RecordLayout:
        """Layout of all caches of this subject."""
        return LAYOUTS[self.dtype]

    @cached_property
    def small(self) -> Path:
        """``SMALL`` records in two shards."""
        return build_cache(
            self.root / "small", SMALL, records_per_shard=PER_SHARD, layout=self.layout
        )

    @cached_property
    def large(self) -> Path:
        """``LARGE`` records in three shards; its first rows are those of ``small``."""
        return build_cache(
            self.root / "large", LARGE, records_per_shard=PER_SHARD, layout=self.layout
        )

    @cached_property
    def features(self) -> dict[str, SelectedTokens]:
        """What a sound read of each key gives."""
        with CacheReader(self.large) as reader:
            return {key: reader.read([row]) for row, key in enumerate(reader.keys)}

    @cached_property
    def small_bytes(self) -> dict[str, bytes]:
        """Every file of ``small``."""
        return all_bytes(self.small)

    @cached_property
    def large_bytes(self) -> dict[str, bytes]:
        """Every file of ``large``."""
        return all_bytes(self.large)

    def writer(self, path: Path, count: int, sync_every: int = 1) -> CacheWriter:
        """Build, resume or extend ``path`` to ``count`` records."""
        return CacheWriter(
            path,
            self.layout,
            FINGERPRINT,
            keys(count),
            records_per_shard=PER_SHARD,
            sync_every=sync_every,
        )

    def fill(
        self,
        path: Path,
        count: int,
        *,
        safe: Collection[int] = (),
        acknowledge: Callable[[Sequence[int]], None] = lambda positions: None,
        sync_every: int = 1,
        batch: int = PER_SHARD,
        finish: bool = True,
    ) -> None:
        """Write what is pending in batches and finish; ``acknowledge`` hears of what is durable.

        Raises ``Broken`` where a position of ``safe`` is asked for again.
        """
        written: list[int] = []
        with self.writer(path, count, sync_every) as writer:
            if again := set(safe).intersection(writer.pending):
                raise Broken(f"finished records are asked for again: {sorted(again)}")
            for first in range(0, count, batch):
                cell = range(first, min(first + batch, count))
                if not all(writer.is_done(position) for position in cell):
                    writer.write(cell, tokens(cell, self.layout))
                    written += cell
                    if len(written) >= sync_every * batch:
                        acknowledge(written)
                        written = []
            if finish:
                writer.finish()

    def check_reader(self, path: Path, modes: Sequence[str] = MODES) -> None:
        """Open and read all: right features, or an error of the cache."""
        for mode in modes:
            with CacheReader(path, mode=mode) as reader:  # type: ignore[arg-type]
                view = reader.view()
                for row, key in enumerate(reader.keys):
                    if not same(reader.read([row]), self.features[key]):
                        raise Broken(f"{path}: wrong features of {key!r} were read")
                    if view is not None and not same(rows_of(view, row), self.features[key]):
                        raise Broken(f"{path}: wrong features of {key!r} were shown")


@dataclass(frozen=True)
class Scenario:
    """A way through the write protocol: how the directory begins, what runs, how it must end."""

    name: str
    begin: Callable[[Path], None]
    work: Callable[..., None]  # (path, *, safe, acknowledge)
    expected: dict[str, bytes]
    sound: bool = True  # False where the cache begins with damage

    def fresh(self, path: Path) -> Path:
        """``path`` as the scenario begins."""
        self.begin(path)
        return path


def scenarios(subject: Subject) -> dict[str, Scenario]:
    """Every way through the write protocol, by name."""

    def nothing(path: Path) -> None:
        pass

    def half_built(path: Path) -> None:
        subject.fill(path, PER_SHARD, finish=False)

    def all_written(path: Path) -> None:
        subject.fill(path, SMALL, finish=False)

    def finished(path: Path) -> None:
        shutil.copytree(subject.small, path)

    def damaged(path: Path) -> None:
        finished(path)
        flip(path / "shard-00000.fpt", 4096 + 5)

    def killed_while_cleaning(path: Path) -> None:
        all_written(path)
        for name in ("plan.fpt", "journal.fpt"):
            (path / f"keep {name}").write_bytes((path / name).read_bytes())
        subject.fill(path, SMALL)
        for name in ("plan.fpt", "journal.fpt"):
            (path / f"keep {name}").rename(path / name)

    def small(path: Path, **how: object) -> None:
        subject.fill(path, SMALL, **how)  # type: ignore[arg-type]

    def lazily(path: Path, **how: object) -> None:
        subject.fill(path, SMALL, sync_every=3, batch=1, **how)  # type: ignore[arg-type]

    def large(path: Path, **how: object) -> None:
        subject.fill(path, LARGE, **how)  # type: ignore[arg-type]

    def repair(path: Path, **how: object) -> None:
        if path.is_dir():  # else a crash came before there was anything
            drop_bad_records(path)
        subject.fill(path, SMALL, **how)  # type: ignore[arg-type]

    ways = (
        Scenario("build", nothing, small, subject.small_bytes),
        Scenario("build, lazily synced", nothing, lazily, subject.small_bytes),
        Scenario("resume", half_built, small, subject.small_bytes),
        Scenario("finish", all_written, small, subject.small_bytes),
        Scenario("clean up", killed_while_cleaning, small, subject.small_bytes),
        Scenario("extend", finished, large, subject.large_bytes),
        Scenario("repair", damaged, repair, subject.small_bytes, sound=False),
    )
    return {way.name: way for way in ways}
