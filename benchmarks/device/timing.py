"""Times by CUDA events with a cold L2, and peak memory; by the clock on a CPU."""

import gc
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import torch

# Enough to push everything else out of any L2, and to keep a GPU busy while the next launch is
# prepared.
_FLUSH_BYTES = 256 << 20
_FEWEST, _MOST = 5, 200


def timed(
    run: Callable[[], object], device: torch.device, seconds: float = 0.3, graph: bool = True
) -> dict[str, Any]:
    """Median ``seconds`` of one run, from a CUDA graph where it can be captured, and ``spread``.

    ``eager_seconds`` counts the launches as a caller pays them.  ``spread`` is the distance of the
    quartiles over the median.  Measures for about twice ``seconds``.
    """
    if device.type != "cuda":
        took = _by_clock(run)
        return {"seconds": took, "eager_seconds": took, "way": "clock"}
    for _ in range(3):
        run()
    eager, spread = _by_events(run, seconds)
    result = {"seconds": eager, "eager_seconds": eager, "spread": spread, "way": "events"}
    if not graph:
        return result
    try:
        replay = _captured(run)
    except RuntimeError as error:
        return {**result, "not_captured": str(error)[:300]}
    middle, spread = _by_events(replay, seconds)
    return {**result, "seconds": middle, "spread": spread, "way": "graph"}


def peak_added(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that one run adds at its peak, its results included; None on a CPU."""
    if device.type != "cuda":
        return None
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def forget() -> None:
    """Give memory back, also what an exception or a cycle of closures held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _captured(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _by_events(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Median and relative distance of the quartiles, every run with a flushed L2."""
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    once = _by_clock(lambda: (run(), torch.cuda.synchronize()))
    count = min(max(int(seconds / max(once, 1e-6)), _FEWEST), _MOST)
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) * 1e-3 for start, end in pairs]
    low, middle, high = quantiles(times, n=4)
    return middle, round((high - low) / middle, 4)


def _by_clock(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
