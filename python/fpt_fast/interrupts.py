"""Stopping cleanly: SIGTERM and Ctrl-C ask for a stop, and the work ends at its next safe point."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(RuntimeError):
    """The user or the system asked for a stop; what was finished is safe."""


class StopRequest:
    """Whether a stop was asked for; a second request stops at once."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    def request(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self._signal is not None:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)

    @property
    def requested(self) -> bool:
        """Whether a stop was asked for."""
        return self._signal is not None

    def check(self, what_to_do: str) -> None:
        """Raise ``Stopped`` with ``what_to_do`` next if a stop was asked for."""
        if self._signal is not None:
            raise Stopped(f"stopped by {self._signal.name}; {what_to_do}")


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
