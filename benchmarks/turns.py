"""Work and the machine measured in turns: best times, ceilings, and the floor's share."""

import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.counts import Ceilings, Count, floor_seconds

Row = dict[str, Any]


def best_times(
    work: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] | None = None,
) -> dict[str, float]:
    """Least seconds of each over ``rounds`` turns, after one turn that does not count.

    ``clock`` is, with one thread, that thread's own time, in which a busy machine has less part.
    """
    if clock is None:
        clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, run in work.items():
            start = clock()
            run()
            seconds = clock() - start
            if turn:
                best[name] = min(seconds, best.get(name, seconds))
    return best


def processor() -> str:
    """The processor's name, from Linux where it has one."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def probes(full: bool) -> tuple[dict[str, Callable[[], object]], Callable[[Row], Ceilings]]:
    """What measures the machine, and how its best times become ceilings."""
    edge, elements = (2048, 64 << 20) if full else (128, 1 << 16)
    left, right = torch.randn(edge, edge), torch.randn(edge, edge)
    source, target = torch.ones(elements), torch.zeros(elements)
    halves = left.bfloat16(), right.bfloat16()

    def ceilings(best: Row) -> Ceilings:
        flops = 2 * edge**3
        return Ceilings(
            2 * source.nbytes / best["copy"],
            {"float32": flops / best["f32"], "bfloat16": flops / best["bf16"]},
        )

    work = {
        "copy": lambda: target.copy_(source),
        "f32": lambda: left @ right,
        "bf16": lambda: halves[0] @ halves[1],
    }
    return work, ceilings


def share(count: Count, ceilings: Ceilings, seconds: float, dtype: str = "float32") -> Row:
    """Seconds, floor and the floor's share of the seconds."""
    floor = floor_seconds(count, ceilings, dtype)
    return {"seconds": seconds, "floor_seconds": floor, "share": floor / seconds}
