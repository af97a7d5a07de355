"""What is done to a cache again and again, a finished one or one that is refused, leaves no memory
behind; nor does counting what it takes.
"""

import random
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle, pairwise
from pathlib import Path

from reliability.fuzz import Target, in_memory
from reliability.memory import Memory
from reliability.subjects import SMALL, Broken, Subject

from fpt_fast.cache import CacheReader, CacheUnfinished, inspect_cache, verify_cache

ROUNDS = 3
A_CALL = 64  # bytes of malloc's that a call may leave: buffers grow a little, for some time


def ways(target: Target) -> dict[str, tuple[int, Callable[[], object]]]:
    """By name: how often a round calls it, and what it calls."""
    pick = random.Random(0)
    lies = [target.lie("manifest", pick) for _ in range(20)]
    next_lie = cycle(lies)

    def resume() -> None:
        target.restore(target.unfinished)
        with suppress(CacheUnfinished):
            CacheReader(target.unfinished)
        target.subject.fill(target.unfinished, SMALL)

    return {
        "read": (100, lambda: target.subject.check_reader(target.finished)),
        "inspect": (200, lambda: inspect_cache(target.finished)),
        "verify": (100, lambda: verify_cache(target.finished, workers=1)),
        "refuse": (400, lambda: target.ask("manifest", next(next_lie), deep=False)),
        "resume": (60, resume),
        "count": (20, lambda: in_memory(lambda: target.ask("manifest", lies[0], True), 4096)),
    }


def check_leaks(root: Path, dtype: str) -> None:
    """Raise ``Broken`` where one of the ways leaves memory behind in each round."""
    target = Target(Subject(root, dtype), root)
    for name, (times, call) in ways(target).items():
        least = min(_left_by_rounds(times, call))
        if least > A_CALL * times:
            raise Broken(f"{name}: {times} calls leave {least} bytes behind, round after round")


def _left_by_rounds(times: int, call: Callable[[], object]) -> list[int]:
    """Bytes that ``times`` calls leave behind, by round.

    A round before them fills buffers.  A table that grows now and then, as the interpreter's of
    interned strings does, grows in one round; a leak in all.
    """
    kept = []
    for _ in range(1 + ROUNDS):
        for _ in range(times):
            call()
        kept.append(Memory.kept().in_use)
    return [after - before for before, after in pairwise(kept)]
