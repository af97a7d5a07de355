"""NVTX ranges for Nsight, and the steps that it is to look at; docs/profiling.md says how.

Ranges lie in the domain ``fpt_fast`` and have registered strings, without which Nsight's capture
range does not see them.  They need the ``profile`` extra; without it they are nothing.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Self

DOMAIN = "fpt_fast"
RANGES = (
    "decode",
    "frozen pass",
    "select",
    "write",
    "read",
    "copy",
    "augment",
    "fusion",
    "side forward",
    "backward",
    "optimiser",
)

log = logging.getLogger("fpt_fast")


def span(name: str) -> AbstractContextManager[Any]:
    """A range called ``name``, one of ``RANGES``, in Nsight's timeline, for a ``with`` block."""
    return _maker()(name)


@cache
def _maker() -> Callable[[str], AbstractContextManager[Any]]:
    """Found out once, and not before somebody needs it: importing stays cheap."""
    try:
        import nvtx
    except ImportError:
        return lambda name: nullcontext()
    return lambda name: nvtx.annotate(name, domain=DOMAIN)


class StepProfiler:
    """Bracket ``steps`` (of this process, from 0) with cudaProfilerStart and cudaProfilerStop.

    A context manager over the whole loop, so that the capture ends with it at the latest.
    Without a CUDA device it says so once and does nothing.
    """

    def __init__(self, steps: range | None = None) -> None:
        self._steps = steps
        self._next = 0
        self._running = False

    @contextmanager
    def step(self) -> Iterator[None]:
        """One step of the loop."""
        if self._steps is not None and self._next == self._steps.start:
            self._start()
        yield
        self._next += 1
        if self._steps is not None and self._next == self._steps.stop:
            self._stop()

    def _start(self) -> None:
        from torch import cuda

        if not cuda.is_available():
            log.warning("profile_steps: there is no CUDA device here, so nothing is captured")
            return
        cuda.synchronize()
        cuda.profiler.start()  # type: ignore[no-untyped-call]
        self._running = True

    def _stop(self) -> None:
        if not self._running:
            return
        from torch import cuda

        cuda.synchronize()
        cuda.profiler.stop()  # type: ignore[no-untyped-call]
        self._running = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
