"""One row of any benchmark: ours and the plain twin in alternation, and all that a row must say.

``alternate`` fills ``extra_info``: ``dtype``, ``bytes`` and ``flops`` (what must be done at
least), and, where pytest-benchmark measures, ``plain_rounds`` (seconds of each), ``plain_seconds``
(their median), ``plain_over_ours``, ``GB/s``, ``GFLOP/s``, ``share_of_floor`` (of the machine's own
ceilings, ``benchmarks/ceilings.py``),
``peak_added`` and ``plain_peak_added`` (bytes that PyTorch allocates at the peak of one run, its
result included; memory of other threads and of NumPy does not count).  A value that cannot be had
is None and has its reason in ``absent``.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, TypeVar

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch.profiler import ProfilerActivity, profile

from benchmarks.ceilings import ceilings
from benchmarks.counts import Count, floor_seconds

T = TypeVar("T")
# What the fixture ``benchmark`` of conftest.py insists on.
ALWAYS = ("dtype", "bytes", "flops")
MEASURED = (
    *ALWAYS,
    *("plain_seconds", "plain_over_ours", "GB/s", "GFLOP/s", "share_of_floor"),
    *("peak_added", "plain_peak_added"),
)


def lacking(info: Mapping[str, Any], needed: Iterable[str] = MEASURED) -> list[str]:
    """What a row should say and neither says nor excuses."""
    absent = info.get("absent", {})
    return [name for name in needed if info.get(name) is None and name not in absent]


def alternate(
    benchmark: BenchmarkFixture,
    ours: Callable[[], T],
    plain: Callable[[], object],
    *,
    dtype: str,
    count: Count,
    rounds: int = 5,
    others: Mapping[str, Callable[[], object]] | None = None,
    is_long: bool = False,
) -> T:
    """Measure ``ours``; before each round run ``plain`` and ``others``, so that a busy machine
    slows all alike.  Returns our last result; ``others`` become ``NAME_seconds``.  Memory of what
    ``is_long`` is counted in the run before the rounds, its optimiser's first states included."""
    beside = {"plain": plain, **(others or {})}
    seconds: dict[str, list[float]] = {name: [] for name in beside}

    def between() -> None:
        for name, run in beside.items():
            seconds[name].append(clock(run))

    peaks: list[int] = []
    if benchmark.enabled:  # caches, lazy loading
        for run in (ours, plain):
            if is_long:
                peaks.append(peak_added(run))
            else:
                run()
    result: T = benchmark.pedantic(ours, setup=between, rounds=rounds if benchmark.enabled else 1)
    info = benchmark.extra_info
    info |= {"dtype": dtype, "bytes": count.bytes, "flops": count.flops}
    if benchmark.enabled:
        info |= speeds(benchmark.stats.stats.median, dtype, count)
        for name, times in seconds.items():
            info[f"{name}_seconds"], info[f"{name}_rounds"] = median(times), times
            info[f"{name}_over_ours"] = ratio_of_rounds(times, benchmark.stats.stats.data)
        peaks = peaks or [peak_added(ours), peak_added(plain)]
        info["peak_added"], info["plain_peak_added"] = peaks
    return result


def ratio_of_rounds(theirs: Sequence[float], ours: Sequence[float]) -> float:
    """Median of the rounds' own ratios: a machine that changes its speed between rounds does not
    change it, as it would the ratio of two medians."""
    return median(their / our for their, our in zip(theirs, ours, strict=True))


def speeds(seconds: float, dtype: str, count: Count) -> dict[str, Any]:
    """Rates, and the floor's part of the time: 1 where nothing could be faster."""
    floor = floor_seconds(count, ceilings(), dtype.partition(" ")[0].removeprefix("torch."))
    return {
        "GB/s": round(count.bytes / seconds / 1e9, 3),
        "GFLOP/s": round(count.flops / seconds / 1e9, 3),
        "share_of_floor": round(floor / seconds, 4),
    }


def clock(run: Callable[[], object]) -> float:
    """Seconds of one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_added(run: Callable[[], object]) -> int:
    """Bytes that PyTorch allocates on the CPU at the peak of one run, from its own records."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    kineto: Any = profiler.profiler
    events = [e for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
