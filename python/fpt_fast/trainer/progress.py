"""Progress of a long loop: a bar on a terminal, else log lines with the time left."""

import logging
import sys
import time
from types import TracebackType
from typing import Protocol, Self

from tqdm import tqdm

LOGGER = logging.getLogger("fpt_fast")

_SECONDS_BETWEEN_LINES = 30.0


class Progress(Protocol):
    """Told of every step; says something now and then."""

    def advance(self, detail: str = "") -> None:
        """Count one step; ``detail`` is what is worth knowing beside it."""

    def message(self, text: str) -> None:
        """Say something worth a line of its own."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class BarProgress:
    """A tqdm bar on stderr; messages scroll above it."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._bar = tqdm(
            total=total, initial=done, desc=title, unit="step", dynamic_ncols=True, leave=False
        )

    def advance(self, detail: str = "") -> None:
        """Move the bar by one step."""
        if detail:
            self._bar.set_postfix_str(detail, refresh=False)
        self._bar.update()

    def message(self, text: str) -> None:
        """Write a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class LogProgress:
    """Lines to the ``fpt_fast`` logger: every message, and one each half minute between them."""

    def __init__(self, title: str, total: int, done: int = 0) -> None:
        self._title = title
        self._total = total
        self._first = done
        self._done = done
        self._start = self._last_line = time.monotonic()

    def advance(self, detail: str = "") -> None:
        """Count one step; log a line when the last one is half a minute old."""
        self._done += 1
        now = time.monotonic()
        if now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._log(f"step {self._done}/{self._total}" + (f", {detail}" if detail else ""), now)

    def message(self, text: str) -> None:
        """Log a line, with the time left."""
        self._log(text, time.monotonic())

    def _log(self, text: str, now: float) -> None:
        self._last_line = now
        LOGGER.info("%s: %s, %s left", self._title, text, format_seconds(self._seconds_left(now)))

    def _seconds_left(self, now: float) -> float:
        made = max(self._done - self._first, 1)
        return (now - self._start) / made * (self._total - self._done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


class SilentProgress:
    """Says nothing."""

    def advance(self, detail: str = "") -> None:
        """Do nothing."""

    def message(self, text: str) -> None:
        """Do nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def open_progress(title: str, total: int, *, enabled: bool = True, done: int = 0) -> Progress:
    """Choose a bar where stderr is a terminal, log lines where it is not."""
    if not enabled:
        return SilentProgress()
    if sys.stderr is not None and sys.stderr.isatty():
        return BarProgress(title, total, done)
    return LogProgress(title, total, done)


def format_seconds(seconds: float) -> str:
    """Write a duration as ``0:07``, ``12:30`` or ``2:05:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
