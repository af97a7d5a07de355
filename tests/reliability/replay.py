"""Replays a way through the write protocol, and pulls the plug at every instant of it."""

import errno
import os
import random
import shutil
from collections import Counter
from pathlib import Path

from cache.samples import all_bytes
from reliability.disk import Call
from reliability.power_loss import Disk, Instant, Recorder, fingerprint_of, images, materialise
from reliability.subjects import SMALL, Broken, Scenario, Subject

from fpt_fast.cache import CacheCorrupt, CacheError, CacheNotFound, CacheUnfinished


class Plug:
    """Checks what may be left at each instant of one scenario, every state once.

    ``most``: above so many states of an instant a sample of that size is taken.
    """

    def __init__(self, subject: Subject, scenario: Scenario, root: Path, most: int) -> None:
        self._subject, self._scenario, self._most = subject, scenario, most
        self._state = root / "state"
        self._seen: set[bytes] = set()
        self._generator = random.Random(0)
        self.counts: Counter[str] = Counter()

    def pull(self, disk: Disk, instant: Instant) -> None:
        """Check each directory that a loss of power may leave at this instant."""
        self.counts["instants"] += 1
        for image in images(disk, self._generator, self._most):
            self.counts["replays"] += 1
            mark = fingerprint_of(image, instant.safe)
            if mark in self._seen:
                continue
            self._seen.add(mark)
            shutil.rmtree(self._state, ignore_errors=True)
            materialise(image, self._state)
            try:
                self._check(instant)
            except (CacheError, OSError, Broken) as error:
                names = {name: len(data) for name, data in (image or {}).items()}
                raise Broken(
                    f"{self._scenario.name}: power lost after step {instant.step} "
                    f"({instant.name}), leaving {names}: {type(error).__name__}: {error}"
                ) from error
        self.counts["states"] = len(self._seen)

    def _check(self, instant: Instant) -> None:
        outcome = _read(self._subject, self._state)
        self.counts[outcome] += 1
        if outcome == "refused" and self._scenario.sound:
            raise Broken("the reader calls it damaged")
        if instant.name == "finished" and outcome != "valid":
            raise Broken(f"it was finished, and is {outcome} now")
        self._scenario.work(self._state, safe=instant.safe)
        if all_bytes(self._state) != self._scenario.expected:
            raise Broken("going on from there ends in other bytes")


def _read(subject: Subject, path: Path) -> str:
    try:
        subject.check_reader(path)
    except CacheUnfinished:
        return "unfinished"
    except CacheNotFound:
        return "nothing"
    except CacheCorrupt:
        return "refused"
    return "valid"


def replay(subject: Subject, scenario: Scenario, root: Path, most: int) -> dict[str, int]:
    """Pull the plug after every call of ``scenario``; counts of instants, replays and states.

    ``replays`` counts images, ``states`` the different ones, each of which was read in both modes
    and gone on from.  Raises ``Broken`` where one reads wrong features, is called damaged, has lost
    a record whose ``write`` had returned, or ends in other bytes than a run without a loss.
    """
    plug = Plug(subject, scenario, root, most)
    # In a folder of its own: the checks are beside what is watched, not below it.
    (root / "recorded").mkdir()
    path = scenario.fresh(root / "recorded" / "cache")
    recorder = Recorder(path, plug.pull)
    recorder.run(lambda: scenario.work(path, acknowledge=recorder.acknowledge))
    _finished(recorder, plug, scenario)
    if all_bytes(path) != scenario.expected:
        raise Broken(f"{scenario.name}: recording changed the result")
    shutil.rmtree(path.parent)
    return dict(plug.counts)


def _finished(recorder: Recorder, plug: Plug, scenario: Scenario) -> None:
    count = sum(name.startswith("shard") for name in scenario.expected)
    if not count:
        raise Broken(f"{scenario.name}: the expected cache has no shards")
    safe = frozenset(range(SMALL))
    plug.pull(recorder.disk, Instant(recorder.steps, "finished", safe))


def replay_failed_syncs(
    subject: Subject, scenario: Scenario, root: Path, most: int
) -> dict[str, int]:
    """Let each sync fail once, go on as a user would, and lose power at the end.

    What a failed sync did not write never reaches the disk, although it can still be read.  Once
    ``finish`` has returned, the cache must be whole all the same.
    """
    counts: Counter[str] = Counter()
    failed = True
    while failed:
        failed = False
        (root / "recorded").mkdir()
        path = scenario.fresh(root / "recorded" / "cache")
        plug = Plug(subject, scenario, root, most)
        recorder = Recorder(path, lambda disk, instant: None)
        syncs = 0

        def failing(call: Call) -> OSError | None:
            nonlocal syncs, failed
            if call.name in ("fsync", "fdatasync") and Path(call.path).suffix:
                syncs += 1
                if syncs == counts["faults"] + 1:
                    failed = True
                    return OSError(errno.EIO, os.strerror(errno.EIO))
            return None

        recorder.failing = failing
        try:
            recorder.run(lambda path=path: scenario.work(path))
        except OSError:
            recorder.run(lambda path=path: scenario.work(path))
        _finished(recorder, plug, scenario)
        shutil.rmtree(path.parent)
        counts["faults"] += failed
        counts["states"] += plug.counts["states"]
    return dict(counts)
