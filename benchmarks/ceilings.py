"""How fast this CPU copies, multiplies and exponentiates: what shares of a floor are shares of."""

import time
from collections.abc import Callable
from functools import cache

import torch

from benchmarks.counts import Ceilings

_ROUNDS = 5


@cache
def ceilings() -> Ceilings:
    """Measured once a process, in about a second: the best of a few runs by PyTorch itself.

    ``bandwidth`` counts bytes read and written by a copy far larger than any cache.
    """
    source = torch.ones(1 << 26)  # 256 MB
    target = torch.empty_like(source)
    copying = _best(lambda: target.copy_(source))
    few = source[: 1 << 20]
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(1536, 1536).to(dtype)
        rates[str(dtype).removeprefix("torch.")] = 2 * 1536**3 / _best(lambda a=a: a @ a)  # type: ignore[misc]
    return Ceilings(
        bandwidth=2 * source.nbytes / copying,
        flops=rates,
        exponentials=few.numel() / _best(few.exp),
    )


def _best(run: Callable[[], object]) -> float:
    times = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
