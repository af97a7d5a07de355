"""A disk that fails: each call of a run in turn, by each kind of failure.

Whatever fails, the run ends in the right bytes or in an error that names a file or the directory;
nothing stays open or locked; and going on without the failure ends in the right bytes, without
asking for a record again whose ``write`` had returned.
"""

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.samples import all_bytes
from reliability.disk import Call, calls_of, open_descriptors, real, watched
from reliability.subjects import MODES, Broken, Scenario, Subject, rows_of, same

from fpt_fast.cache import CacheError, CacheReader, verify_cache


@dataclass(frozen=True)
class Fault:
    """A kind of failure: at one call, or at that call and every later one of its kind."""

    name: str
    calls: tuple[str, ...]
    code: int = 0  # 0: the call does less than it was asked for
    lasting: bool = False


_WRITES = (
    *("create", "open", "pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync"),
    *("replace", "rename", "unlink", "mkdir"),
)
_READS = ("open", "preadv", "pread", "stat", "lstat", "fstat", "scandir", "listdir", "mmap")
_SPACE = ("create", "pwrite", "ftruncate", "posix_fallocate", "fsync", "fdatasync", "replace")
FAULTS = (
    Fault("no space", (*_SPACE, "rename", "mkdir"), errno.ENOSPC),
    Fault("no space from here on", (*_SPACE, "mkdir"), errno.ENOSPC, lasting=True),
    Fault("I/O error", (*_WRITES, "close", "flock"), errno.EIO),
    Fault("I/O error from here on", ("pwrite", "fsync", "fdatasync"), errno.EIO, lasting=True),
    Fault("I/O error in reading", _READS, errno.EIO),
    Fault("interrupted", (*_WRITES, *_READS), errno.EINTR),
    Fault("short", ("pwrite", "preadv", "pread")),
    Fault("short from here on", ("pwrite", "preadv", "pread"), lasting=True),
    Fault("no memory", ("mmap",), errno.ENOMEM),
)


class Saboteur:
    """Lets call number ``at`` of a fault's calls fail."""

    def __init__(self, fault: Fault, at: int) -> None:
        self._fault, self._at = fault, at
        self._count = -1
        self.struck = ""

    def __call__(self, call: Call, proceed: Callable[[], Any]) -> Any:
        if call.name not in self._fault.calls:
            return proceed()
        self._count += 1
        if self._count < self._at or (self._count > self._at and not self._fault.lasting):
            return proceed()
        self.struck = self.struck or f"{call.name} {Path(call.path).name}"
        if self._fault.code == 0:
            return _less(call, half=self._fault.lasting)
        if call.name == "close":  # what Linux does: the descriptor is gone all the same
            proceed()
        # Calls on a path carry it in their error, calls on a descriptor do not.
        names = [] if isinstance(call.args[0], int) else [call.path]
        raise OSError(self._fault.code, os.strerror(self._fault.code), *names)


def _less(call: Call, half: bool) -> Any:
    """One byte of it, or half."""
    fd, data = call.args[:2]
    if call.name == "pread":
        return real.pread(fd, (data + 1) // 2 if half else 1, call.args[2])
    view = memoryview(data if call.name == "pwrite" else data[0])
    part = view[: (len(view) + 1) // 2 if half else 1]
    if call.name == "pwrite":
        return real.pwrite(fd, part, call.args[2])
    return real.preadv(fd, [part], call.args[2])


def _strike(path: Path, saboteur: Saboteur, work: Callable[[], None]) -> str:
    """Run ``work`` with a fault: ``""`` for success, else the error's class; checks its text."""
    before = open_descriptors()
    try:
        with watched(path.parent, saboteur):
            work()
    except (CacheError, OSError) as error:
        if str(path.parent) not in str(error):
            raise Broken(f"the error names no file of {path}: {error!r}") from error
        outcome = type(error).__name__
    else:
        outcome = ""
    if (after := open_descriptors()) != before:
        raise Broken(f"{before} descriptors were open before, {after} after")
    return outcome


def attack_writing(scenario: Scenario, root: Path, stride: int = 1) -> dict[str, int]:
    """Each fault at each call of ``scenario``; counts of faults and of how they ended.

    ``stride``: only at every so-many-th call.
    """
    counts: Counter[str] = Counter()
    path = scenario.fresh(root / "faulty")
    calls = calls_of(root, lambda: scenario.work(path))
    shutil.rmtree(path)
    for number, fault in enumerate(FAULTS):
        for at in range(number % stride, sum(call.name in fault.calls for call in calls), stride):
            scenario.fresh(path)
            safe: list[int] = []
            saboteur = Saboteur(fault, at)
            try:
                outcome = _strike(
                    path, saboteur, lambda safe=safe: scenario.work(path, acknowledge=safe.extend)
                )
                if outcome:
                    scenario.work(path, safe=safe)
                if all_bytes(path) != scenario.expected:
                    raise Broken("the result differs")
            except (CacheError, OSError, Broken) as error:
                raise Broken(
                    f"{scenario.name}: {fault.name!r} at {saboteur.struck} (call {at}): "
                    f"{type(error).__name__}: {error}"
                ) from error
            counts["faults"] += bool(saboteur.struck)
            counts["errors" if outcome else "successes"] += bool(saboteur.struck)
            shutil.rmtree(path)
    return dict(counts)


def attack_reading(subject: Subject, root: Path, stride: int = 1) -> dict[str, int]:
    """Each fault at each call of opening, reading, viewing and verifying a finished cache."""
    counts: Counter[str] = Counter()
    path = root / "read"
    shutil.copytree(subject.small, path)
    ways: list[Callable[[], None]] = [lambda: _verified(path)]
    for mode in MODES:
        ways += [
            lambda mode=mode: subject.check_reader(path, [mode]),
            lambda mode=mode: _read_together(subject, path, mode),
        ]
    for way in ways:
        calls = calls_of(root, way)
        for number, fault in enumerate(FAULTS):
            strikes = sum(call.name in fault.calls for call in calls)
            for at in range(number % stride, strikes, stride):
                saboteur = Saboteur(fault, at)
                try:
                    outcome = _strike(path, saboteur, way)
                    way()
                except (CacheError, OSError, Broken) as error:
                    raise Broken(
                        f"reading: {fault.name!r} at {saboteur.struck} (call {at}): "
                        f"{type(error).__name__}: {error}"
                    ) from error
                counts["faults"] += bool(saboteur.struck)
                counts["errors" if outcome else "successes"] += bool(saboteur.struck)
    shutil.rmtree(path)
    return dict(counts)


def _verified(path: Path) -> None:
    report = verify_cache(path, workers=1)
    if not report.ok:
        raise OSError(errno.EIO, str(report))


def _read_together(subject: Subject, path: Path, mode: str) -> None:
    """Two threads, rows of both shards, a view where there is one."""
    with CacheReader(path, mode=mode, threads=2) as reader:  # type: ignore[arg-type]
        rows = [4, 0, 3]
        back = reader.read(rows)
        for place, row in enumerate(rows):
            if not same(rows_of(back, place), subject.features[reader.keys[row]]):
                raise Broken(f"wrong features of row {row}")
        reader.view([1, 4])
