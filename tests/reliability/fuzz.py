"""Lies (``lies.py``) put to everything that opens a cache.

Whatever comes, the answer is records as they were written or an error of the cache, within a time
and within memory in proportion to the file: never another exception, a hang, a crash, or an
allocation that a count alone asks for.  A list of keys in another order, checksummed anew, is
past all telling; so records are compared by row.
"""

import random
import shutil
import signal
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cache.samples import all_bytes, keys
from reliability.disk import real
from reliability.lies import lying_journal, lying_manifest, lying_shard
from reliability.memory import Memory, apart, limited_memory
from reliability.subjects import MODES, SMALL, Broken, Subject, rows_of, same

from fpt_fast.cache import (
    CacheError,
    CacheReader,
    drop_bad_records,
    inspect_cache,
    verify_cache,
)
from fpt_fast.cache.format import JOURNAL_FILE, MANIFEST_FILE, PLAN_FILE, read_manifest, shard_file
from fpt_fast.cache.layout import PAGE_BYTES

SECONDS = 10  # that one input may take, on a busy machine
MEMORY = 48 * 2**20  # that a process may grow by for one input, and keep of all
IN_USE = 16 * 2**20  # of malloc's that it may keep
BLOCKS = 20_000  # of Python's memory that it may keep
DEEP = 10  # every so-many-th input is put to the slow tools too
TRACED = 200  # and to every so-many-th the memory is counted
KINDS = ("manifest", "plan", "shard", "journal")
WEIGHTS = (12, 5, 1, 2)
CONSISTENT = "consistent"


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise Broken(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Target:
    """A finished and an unfinished cache whose files are replaced by lies, one after the other."""

    def __init__(self, subject: Subject, root: Path) -> None:
        self.subject = subject
        self.finished, self.unfinished = root / "finished", root / "unfinished"
        self.shard = self.finished / shard_file(0, finished=True)
        subject.fill(self.finished, SMALL)
        subject.fill(self.unfinished, 4, batch=1, finish=False)
        self.files = {path: all_bytes(path) for path in (self.finished, self.unfinished)}
        self.rows = [subject.features[key] for key in keys(SMALL)]
        self.identity = read_manifest(self.unfinished / PLAN_FILE, "plan").identity

    def lie(self, kind: str, pick: random.Random) -> bytes:
        """The bytes of a file of this kind that lies."""
        if kind == "shard":
            return lying_shard(self.shard_bytes[:PAGE_BYTES], pick)
        if kind == "journal":
            return lying_journal(self.files[self.unfinished][JOURNAL_FILE], self.identity, pick)
        path, name = self._place(kind)
        return lying_manifest(self.files[path][name], pick).bytes()

    @property
    def shard_bytes(self) -> bytes:
        """The shard that a lie is told of, as it was written."""
        return self.files[self.finished][self.shard.name]

    def ask(self, kind: str, data: bytes, deep: bool) -> str:
        """Put a lie in its place; the answers of all that may look at it, in one word."""
        path, name = self._place(kind)
        told = data + self.shard_bytes[PAGE_BYTES:] if kind == "shard" else data
        _put(path / name, told)
        try:
            return self._answer(kind, path, path / name, deep)
        finally:
            if deep and path == self.unfinished:
                self.restore(path)
            else:
                _put(path / name, self.files[path][name])

    def _place(self, kind: str) -> tuple[Path, str]:
        return {
            "manifest": (self.finished, MANIFEST_FILE),
            "shard": (self.finished, self.shard.name),
            "plan": (self.unfinished, PLAN_FILE),
            "journal": (self.unfinished, JOURNAL_FILE),
        }[kind]

    def _answer(self, kind: str, path: Path, file: Path, deep: bool) -> str:
        answer = CONSISTENT
        if kind in ("manifest", "plan"):
            try:
                read_manifest(file, "manifest" if kind == "manifest" else "plan")
            except CacheError as error:
                answer = type(error).__name__
        if answer != CONSISTENT and not deep:
            return answer
        for work in self._works(path, deep):
            try:
                work()
            except CacheError as error:
                if kind == "shard":
                    answer = type(error).__name__
            else:
                # What is refused by one must not be shown by another.
                if work == self._read and answer != CONSISTENT:
                    raise Broken(f"{file.name} is refused as {answer}, and was read")
        if kind == "shard" and answer == CONSISTENT:
            raise Broken("another shard's header was believed")
        return answer

    def _works(self, path: Path, deep: bool) -> list[Callable[[], Any]]:
        if path == self.finished:
            slow = [lambda: verify_cache(path, workers=1)] if deep else []
            return [self._read, lambda: inspect_cache(path), *slow]
        works: list[Callable[[], Any]] = [lambda: CacheReader(path), lambda: inspect_cache(path)]
        if deep:
            works += [
                lambda: verify_cache(path, workers=1),
                self._go_on,
                lambda: drop_bad_records(path),
            ]
        return works

    def _read(self) -> None:
        for mode in MODES:
            with CacheReader(self.finished, mode=mode) as reader:  # type: ignore[arg-type]
                view = reader.view()
                for row in range(len(reader)):
                    if not same(reader.read([row]), self.rows[row]):
                        raise Broken(f"row {row} was read as what was never written")
                    if view is not None and not same(rows_of(view, row), self.rows[row]):
                        raise Broken(f"row {row} was shown as what was never written")

    def _go_on(self) -> None:
        """Resume and finish; no record comes out that was never written, and none under another
        key unless the keys themselves are the lie.
        """
        self.subject.fill(self.unfinished, SMALL)
        with CacheReader(self.unfinished) as reader:
            told = reader.keys[:SMALL] == tuple(keys(SMALL))
            for row, key in enumerate(reader.keys):
                found = reader.read([row])
                allowed = [self.subject.features[key]] if told else self.rows
                if not any(same(found, record) for record in allowed):
                    raise Broken(f"a build that went on holds wrong features of {key!r}")

    def restore(self, path: Path) -> None:
        """Make a directory what it was at first."""
        shutil.rmtree(path)
        path.mkdir()
        for name, data in self.files[path].items():
            (path / name).write_bytes(data)


def _put(file: Path, data: bytes) -> None:
    """Make ``file`` hold ``data``, without asking for durability."""
    fd = real.open(file, 0o1 | 0o100 | 0o1000)  # write only, create, truncate
    real.pwrite(fd, data, 0)
    real.close(fd)


def fuzz(subject: Subject, root: Path, inputs: int, seed: int = 0) -> dict[str, int]:
    """``inputs`` lies; counts of the answers, and of the inputs by what they lie about."""
    target = Target(subject, root)
    pick = random.Random(seed)
    counts: Counter[str] = Counter()
    # Once before the limit, so that code and buffers that are needed anyway are there.
    for kind in KINDS:
        target.ask(kind, target.lie(kind, pick), deep=True)
    before = Memory.kept()
    for number in range(inputs):
        kind = pick.choices(KINDS, WEIGHTS)[0]
        data = target.lie(kind, pick)
        deep = number % DEEP == 0
        ask = partial(target.ask, kind, data, deep)
        try:
            # The lies themselves are ours, and may take what they like.
            with limited_memory(MEMORY), _in_time():
                answer = in_memory(ask, len(data)) if number % TRACED == 0 else ask()
        except BaseException as error:
            raise Broken(
                f"input {number} of seed {seed}, a {kind} that begins {data[:500]!r}: "
                f"{type(error).__name__}: {error}"
            ) from error
        counts[answer] += 1
        counts[f"{kind}s"] += 1
    left = Memory.kept() - before
    if left.blocks > BLOCKS or left.in_use > IN_USE or left.resident > MEMORY:
        raise Broken(f"{inputs} inputs left behind: {left}")
    counts["inputs"] = inputs
    return dict(counts)


def in_memory(ask: Callable[[], str], size: int) -> str:
    """The answer, whose memory must be in proportion to a file of ``size`` bytes.

    It is counted in a child: Python before 3.12.5 never frees what the tracer recorded of each
    line (gh-121390), which a long run would take for a leak.
    """
    return apart(partial(_counted, ask, size))


def _counted(ask: Callable[[], str], size: int) -> str:
    # JSON takes up to some 60 bytes of memory a byte (a list of empty dicts), once and again.
    allowed = 2**20 + 128 * size
    answer, peak = _traced(ask)
    if peak > allowed:
        # Now and then the interpreter's table of interned strings grows by megabytes, whatever
        # the input.  What an input asks for, it asks for again.
        answer, peak = _traced(ask)
    if peak > allowed:
        raise Broken(f"took {peak} bytes for a file of {size}")
    return answer


def _traced(ask: Callable[[], str]) -> tuple[str, int]:
    tracemalloc.start()
    try:
        return ask(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
