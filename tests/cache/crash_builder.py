"""Builds caches in child processes and kills them: the other half of test_crash.py.

One process imports torch and forks a child for each attempt, so that hundreds of kills take
seconds.  Prints a JSON report; a broken promise is an exception, and so a failed test.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cache.samples import FINGERPRINT, LAYOUT, all_bytes, build_cache, flip, keys, tokens

from fpt_fast.cache import (
    CacheNotFound,
    CacheReader,
    CacheUnfinished,
    CacheWriter,
    drop_bad_records,
    inspect_cache,
)

RECORDS, BATCH, PER_SHARD = 40, 2, 16
STEP_RECORDS, STEP_EXTENDED, STEP_PER_SHARD = 5, 8, 3
# Every call that changes what is on disk, or makes it durable.
STEPS = ("pwrite", "fsync", "fdatasync", "replace", "rename", "unlink", "posix_fallocate")


def in_child(work: Callable[[], None]) -> int:
    """Fork, run ``work``, and return the child's process id at once."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException as error:  # the child must never return into the parent's code
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os._exit(0)


def fill(path: Path, count: int, log: Path, pause: float = 0.0) -> None:
    """Open, resume or extend; write what is pending in batches; finish.

    Each position goes to ``log`` after its ``write`` returned: none of these may be pending.
    """
    safe = {int(line) for line in log.read_text().split()} if log.exists() else set()
    with CacheWriter(path, LAYOUT, FINGERPRINT, keys(count), records_per_shard=PER_SHARD) as writer:
        if again := safe.intersection(writer.pending):
            raise RuntimeError(f"finished records are asked for again: {sorted(again)}")
        for first in range(0, count, BATCH):
            cell = range(first, min(first + BATCH, count))
            if all(writer.is_done(position) for position in cell):
                continue
            time.sleep(random.uniform(0, pause))
            writer.write(cell, tokens(cell))
            with log.open("a") as stream:
                stream.write("".join(f"{position}\n" for position in cell))
        writer.finish()


def random_kills(root: Path, wanted: int) -> dict[str, int]:
    """Kill builds at random instants, ``wanted`` times; each ends equal to one in one go."""
    expected = all_bytes(build_cache(root / "one go", RECORDS, records_per_shard=PER_SHARD))
    generator = random.Random(0)
    kills, builds, longest = 0, 0, 0.02
    while kills < wanted or builds == 0:
        path, log = root / f"killed {builds}", root / f"log {builds}"
        while True:
            random.seed(generator.random())
            child = in_child(partial(fill, path, RECORDS, log, pause=0.004))
            time.sleep(generator.uniform(0, longest))
            # A slow machine must get to the end, too.
            longest *= 1.05
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if not os.WIFSIGNALED(status):
                break
            kills += 1
            check_state(path)
        if status:
            raise RuntimeError(f"a child failed after {kills} kills")
        if all_bytes(path) != expected:
            raise RuntimeError(f"build {builds} differs from one in one go after {kills} kills")
        builds += 1
    return {"kills": kills, "builds": builds}


def check_state(path: Path) -> None:
    """After a kill a reader sees a whole cache or an unfinished one, never a damaged one."""
    try:
        with CacheReader(path) as reader:
            reader.read(range(len(reader)))
    except CacheUnfinished:
        inspect_cache(path)
    except CacheNotFound:
        pass


@contextmanager
def watched(before: Callable[[str, Sequence[Any]], None]) -> Iterator[None]:
    """Call ``before(name, arguments)`` ahead of each call of ``STEPS``."""
    originals = {name: getattr(os, name) for name in STEPS}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(name, args)
            return originals[name](*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, wrap(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def steps_of(work: Callable[[], None]) -> list[str]:
    """Names of the calls that ``work`` makes, in order."""
    names: list[str] = []
    with watched(lambda name, args: names.append(name)):
        work()
    return names


def die_at(step: int, torn: bool, work: Callable[[], None]) -> None:
    """Run ``work`` up to its ``step``-th call; ``torn``: half of that write still happens."""
    count, write = 0, os.pwrite

    def before(name: str, args: Sequence[Any]) -> None:
        nonlocal count
        if count == step:
            if torn:
                fd, data, offset = args
                write(fd, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    with watched(before):
        work()


def step_fill(path: Path, count: int) -> None:
    """Write everything that is pending, in one batch per shard; finish."""
    with CacheWriter(
        path, LAYOUT, FINGERPRINT, keys(count), records_per_shard=STEP_PER_SHARD
    ) as writer:
        for first in range(0, count, STEP_PER_SHARD):
            cell = range(first, min(first + STEP_PER_SHARD, count))
            writer.write(cell, tokens(cell))
        writer.finish()


def step_repair(path: Path) -> None:
    """Repair what the scenario damaged, and build it again."""
    drop_bad_records(path)
    step_fill(path, STEP_RECORDS)


def every_step(root: Path, scenario: str) -> dict[str, int]:
    """Kill at each call that touches the disk, go on without a kill, compare."""
    small = build_cache(root / "small", STEP_RECORDS, records_per_shard=STEP_PER_SHARD)
    large = build_cache(root / "large", STEP_EXTENDED, records_per_shard=STEP_PER_SHARD)
    damaged = Path(shutil.copytree(small, root / "damaged"))
    flip(damaged / "shard-00000.fpt", 4096 + 5)
    begin, work, expected = {
        "build": (None, lambda path: step_fill(path, STEP_RECORDS), all_bytes(small)),
        "extend": (small, lambda path: step_fill(path, STEP_EXTENDED), all_bytes(large)),
        "repair": (damaged, step_repair, all_bytes(small)),
    }[scenario]
    # What a kill leaves does not depend on these two, and they are nearly all of the time.
    os.fsync = os.fdatasync = lambda fd: None

    def fresh(name: str) -> Path:
        path = root / name
        if begin is not None:
            shutil.copytree(begin, path)
        return path

    rehearsal = fresh("rehearsal")
    names = steps_of(partial(work, rehearsal))
    for step, name in enumerate(names):
        for torn in (False, True) if name == "pwrite" else (False,):
            path = fresh(f"step {step} {torn}")
            child = in_child(
                lambda path=path, step=step, torn=torn: die_at(step, torn, lambda: work(path))
            )
            if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
                raise RuntimeError(f"{scenario}: the child did not get to step {step}")
            if scenario != "repair":  # which begins with a damaged cache
                check_state(path)
            work(path)
            if all_bytes(path) != expected:
                raise RuntimeError(
                    f"{scenario}: killed at step {step} ({name}), the result differs"
                )
            shutil.rmtree(path)
    return {"steps": len(names)}


if __name__ == "__main__":
    root = Path(sys.argv[1])
    report: dict[str, Any] = {"random": random_kills(root, int(sys.argv[2]))}
    for name in sys.argv[3:]:
        (root / name).mkdir()
        report[name] = every_step(root / name, name)
    sys.stdout.write(json.dumps(report))
