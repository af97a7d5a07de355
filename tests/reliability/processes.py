"""Several processes at one cache: two builders, a builder with readers, locks of the dead."""

import os
import shutil
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path

from cache.samples import all_bytes
from reliability.kills import in_child, was_killed
from reliability.subjects import LARGE, SMALL, Broken, Subject

from fpt_fast.cache import CacheBusy, CacheNotFound, CacheUnfinished, inspect_cache, verify_cache


def two_builders(subject: Subject, root: Path, rounds: int) -> dict[str, int]:
    """Two processes build one cache: one is refused by name, and comes back until it is done."""
    counts: Counter[str] = Counter(refusals=0)
    path, logs = root / "both", [root / "first", root / "second"]
    for _ in range(rounds):
        children = [in_child(partial(_build_stubbornly, subject, path, log)) for log in logs]
        killed = [was_killed(child) for child in children]
        if any(killed):
            raise Broken("a builder was killed")
        if all_bytes(path) != subject.large_bytes:
            raise Broken("two builders made another cache than one")
        counts["refusals"] += sum(int(log.read_text()) for log in logs)
        counts["rounds"] += 1
        shutil.rmtree(path)
    return dict(counts)


def _build_stubbornly(subject: Subject, path: Path, log: Path) -> None:
    refusals = 0
    while True:
        try:
            subject.fill(path, LARGE, batch=1, acknowledge=lambda _: time.sleep(0.005))
            break
        except CacheBusy as error:
            if "being built by" not in str(error):
                raise Broken(f"the refusal does not say who builds: {error}") from error
            refusals += 1
            time.sleep(0.005)
    log.write_text(str(refusals))


def builder_and_readers(subject: Subject, root: Path, rounds: int) -> dict[str, int]:
    """Readers look while a cache is built, extended and finished: they see all, or nothing yet."""
    counts: Counter[str] = Counter()
    current, stop = root / "current", root / "stop"
    path = root / "seen 0"
    current.symlink_to(path)
    logs = [root / f"reader {number}" for number in range(2)]
    children = [in_child(partial(_look, subject, current, stop, log)) for log in logs]
    try:
        for _ in range(rounds):
            subject.fill(path, SMALL, batch=1, acknowledge=lambda _: time.sleep(0.001))
            subject.fill(path, LARGE, batch=1, acknowledge=lambda _: time.sleep(0.001))
            counts["rounds"] += 1
            # Never emptied, so that readers see no half of a removal.
            path = root / f"seen {counts['rounds']}"
            (root / "next").symlink_to(path)
            (root / "next").replace(current)
    finally:
        stop.touch()
        killed = [was_killed(child) for child in children]
    if any(killed):
        raise Broken("a reader was killed")
    counts["looks"] = sum(int(log.read_text()) for log in logs)
    return dict(counts)


def _look(subject: Subject, current: Path, stop: Path, log: Path) -> None:
    looks = 0
    while not stop.exists():
        path = current.readlink()
        try:
            subject.check_reader(path)
            inspect_cache(path)
            report = verify_cache(path, workers=1)
        except (CacheUnfinished, CacheNotFound):
            pass
        else:
            if report.bad_keys:
                raise Broken(f"a sound cache is called damaged:\n{report}")
        looks += 1
    log.write_text(str(looks))


def stale_locks(subject: Subject, root: Path) -> dict[str, int]:
    """The lock files of a killed builder, of another host's and of none stop nobody."""
    counts: Counter[str] = Counter()
    path, ready = root / "stale", root / "ready"

    def hold() -> None:
        subject.writer(path, SMALL)
        ready.touch()
        signal.pause()

    child = in_child(hold)
    while not ready.exists():
        time.sleep(0.001)
    try:
        subject.writer(path, SMALL)
    except CacheBusy as error:
        if f"process {child} on " not in str(error):
            raise Broken(f"the refusal does not name process {child}: {error}") from error
    else:
        raise Broken("a living builder was not respected")
    os.kill(child, signal.SIGKILL)
    was_killed(child)
    if not (path / "lock").exists():
        raise Broken("a killed builder leaves its lock file, or else this tests nothing")
    contents = [(path / "lock").read_bytes(), b"4 another-host\n", b"", b"\xff" * 1000]
    for content in contents:
        (path / "lock").write_bytes(content)
        subject.fill(path, SMALL)
        if all_bytes(path) != subject.small_bytes:
            raise Broken(f"a stale lock file of {content[:40]!r} changes the result")
        counts["locks"] += 1
        shutil.rmtree(path)
        subject.fill(path, SMALL, finish=False)
    return dict(counts)
