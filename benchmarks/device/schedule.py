"""What runs when: phases in order of worth, each with its share of the time that is left."""

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.device.report import Report

# An item that ignores the seconds it was given is ended this long after them.
GRACE_SECONDS = 20.0


class OutOfTime(Exception):
    """What an item needs more seconds for than it was given: it counts as not run."""


@dataclass(frozen=True)
class Item:
    """``run(seconds)`` gets the seconds left for it and returns its result, JSON-ready.

    It is not started where fewer than ``least`` seconds are left.
    """

    name: str
    run: Callable[[float], dict[str, Any]]
    least: float = 1.0


@dataclass(frozen=True)
class Phase:
    """Items in order of worth; ``share`` is relative to those of the phases that follow."""

    name: str
    share: float
    items: Callable[[], Sequence[Item]]


def phase_seconds(left: float, shares: Sequence[float]) -> float:
    """The part of ``left`` that the first of ``shares`` may take; unused time moves on."""
    return max(0.0, left) * shares[0] / sum(shares)


def run_phases(
    report: Report,
    phases: Sequence[Phase],
    deadline: float,
    is_broken: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.time,
) -> bool:
    """Run what ``report`` has not settled yet until ``deadline``; False where a new process must.

    After an item failed, ``is_broken`` says whether this process can still use its device.
    """
    for position, phase in enumerate(phases):
        shares = [later.share for later in phases[position:]]
        end = clock() + phase_seconds(deadline - clock(), shares)
        items = _planned(report, phase)
        for item in items:
            left = end - clock()
            if report.is_settled(phase.name, item.name) or left < item.least:
                continue
            report.start(phase.name, item.name, clock() + left + GRACE_SECONDS)
            try:
                result = item.run(left)
            except OutOfTime as error:
                report.settle("not run", why=str(error))
            except Exception as error:
                report.settle("failed", why=_line(error), trace=_trace())
                if is_broken():
                    return False
            else:
                report.settle("done", result=result)
    return True


def _planned(report: Report, phase: Phase) -> Sequence[Item]:
    """The items, named in the report; where listing them fails, that is a failed item."""
    try:
        items = phase.items()
    except Exception as error:
        report.start(phase.name, "listing its items", 0.0)
        report.settle("failed", why=_line(error), trace=_trace())
        return ()
    report.plan(phase.name, [item.name for item in items])
    return items


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:2000]}"


def _trace() -> str:
    return traceback.format_exc()[-4000:]
