"""Stopping cleanly: SIGTERM and Ctrl-C ask for a stop, and the work ends at its next safe point."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(RuntimeError):
    """The user or the system asked for a stop; what was finished is safe."""


# torchrun passes a signal on that a terminal or SLURM has sent to its processes already.
_ECHO_SECONDS = 1.0


class StopRequest:
    """Whether a stop was asked for; a second request, later than an echo, stops at once."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._since = 0.0

    def request(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._since = signal.Signals(number), now
        elif now - self._since > _ECHO_SECONDS:
            raise KeyboardInterrupt

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._signal is not None

    def check(self, what_to_do: str, *, elsewhere: bool = False) -> None:
        """Raise ``Stopped`` with ``what_to_do`` next if a stop was asked for, here or
        ``elsewhere``, of another process at the same task."""
        if self._signal is not None:
            raise Stopped(f"stopped by {self._signal.name}; {what_to_do}")
        if elsewhere:
            raise Stopped(f"stopped by a signal to another rank; {what_to_do}")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request to be checked at safe points.

    Handlers can only be set in the main thread; elsewhere signals keep their meaning.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {
        number: signal.signal(number, request.request) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
