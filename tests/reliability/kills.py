"""SIGKILL: at random instants, and at every step of the write protocol.

Children are forked from a process that has imported torch already, so that hundreds of kills take
seconds; ``attack.py`` runs this in a process of its own.
"""

import os
import random
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cache.samples import all_bytes
from reliability.disk import CHANGING, Call, calls_of, real, watched
from reliability.subjects import LARGE, Broken, Scenario, Subject, scenarios

from fpt_fast.cache import CacheNotFound, CacheUnfinished, verify_cache


def in_child(work: Callable[[], None]) -> int:
    """Fork, run ``work``, and return the child's process id at once."""
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:  # the child must never return into the parent's code
        os.write(2, traceback.format_exc().encode())
        os._exit(1)
    os._exit(0)


def was_killed(child: int) -> bool:
    """Wait for a child: True where SIGKILL ended it; raises where it failed by itself."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    if status:
        raise Broken(f"a child ended with status {status}")
    return False


def check_state(subject: Subject, path: Path) -> None:
    """After a kill all that is there is sound: a whole cache or an unfinished one."""
    try:
        subject.check_reader(path)
    except CacheNotFound:
        return
    except CacheUnfinished:
        pass
    report = verify_cache(path, workers=1)
    leftover = [text for text in report.problems if "left over from a killed build" not in text]
    if report.bad_keys or leftover:
        raise Broken(f"after a kill:\n{report}")


def random_kills(subject: Subject, root: Path, wanted: int, seed: int = 0) -> dict[str, int]:
    """Kill builds at random instants, ``wanted`` times; each ends equal to one in one go."""
    generator = random.Random(seed)
    counts: Counter[str] = Counter(builds=0)
    longest = 0.02
    while counts["kills"] < wanted or not counts["builds"]:
        path, log = root / "killed", root / "log"
        log.write_text("")
        while True:
            child = in_child(partial(_fill_slowly, subject, path, log, generator.random()))
            time.sleep(generator.uniform(0, longest))
            # A slow machine must get to the end, too.
            longest *= 1.02
            os.kill(child, signal.SIGKILL)
            if not was_killed(child):
                break
            counts["kills"] += 1
            check_state(subject, path)
        if all_bytes(path) != subject.large_bytes:
            raise Broken(f"differs from a build in one go after {counts['kills']} kills")
        counts["builds"] += 1
        longest = max(0.01, longest / 2)
        shutil.rmtree(path)
    return dict(counts)


def _fill_slowly(subject: Subject, path: Path, log: Path, seed: float) -> None:
    generator = random.Random(seed)
    # A line that was cut short by the kill has no promise in it.
    safe = {int(line) for line in log.read_text().split("\n")[:-1]}

    def note(positions: Sequence[int]) -> None:
        with log.open("a") as stream:
            stream.write("".join(f"{position}\n" for position in positions))
        time.sleep(generator.uniform(0, 0.004))

    subject.fill(path, LARGE, safe=safe, acknowledge=note, batch=1)


def kill_at_every_step(subject: Subject, root: Path, stride: int = 1) -> dict[str, int]:
    """Kill at each call that changes the disk, and in the middle of each write; go on, compare.

    ``stride``: only at every so-many-th of these places, counted through all scenarios.
    """
    counts: Counter[str] = Counter()
    # What a kill leaves does not depend on these two, and they are nearly all of the time.
    os.fsync = os.fdatasync = lambda fd: None
    for scenario in scenarios(subject).values():
        path = scenario.fresh(root / "rehearsal")
        steps = calls_of(root, partial(scenario.work, path), CHANGING)
        shutil.rmtree(path)
        for step, call in enumerate(steps):
            for torn in (False, True) if call.name == "pwrite" else (False,):
                if counts["places"] % stride == 0:
                    _kill_at(subject, scenario, root / "step", step, torn)
                    counts["kills"] += 1
                counts["places"] += 1
    return dict(counts)


def _kill_at(subject: Subject, scenario: Scenario, path: Path, step: int, torn: bool) -> None:
    scenario.fresh(path)
    where = f"{scenario.name}: killed at step {step}{', half written' if torn else ''}"
    if not was_killed(in_child(partial(_die_at, path, step, torn, partial(scenario.work, path)))):
        raise Broken(f"{where}: the child did not get there")
    if scenario.sound:
        check_state(subject, path)
    scenario.work(path)
    if all_bytes(path) != scenario.expected:
        raise Broken(f"{where}: the result differs")
    shutil.rmtree(path)


def _die_at(path: Path, step: int, torn: bool, work: Callable[[], None]) -> None:
    count = 0

    def hook(call: Call, proceed: Callable[[], Any]) -> Any:
        nonlocal count
        if call.name in CHANGING:
            if count == step:
                if torn:
                    fd, data, offset = call.args
                    real.pwrite(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
        return proceed()

    with watched(path.parent, hook):
        work()
