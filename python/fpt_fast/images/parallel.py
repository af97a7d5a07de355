"""Threads that work ahead, in order and with bounded memory."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_T = TypeVar("_T")
_R = TypeVar("_R")


def ordered_map(
    function: Callable[[_T], _R], items: Iterable[_T], *, workers: int, ahead: int
) -> Generator[_R, None, None]:
    """Yield ``function`` of each item in order, computed in ``workers`` threads.

    At most ``ahead`` results beyond the one in the caller's hands are computed or waiting.  An
    exception appears at its item's turn; closing the iterator drops what has not begun.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    return _ordered_map(function, items, workers, max(ahead, workers))


def _ordered_map(
    function: Callable[[_T], _R], items: Iterable[_T], workers: int, ahead: int
) -> Generator[_R, None, None]:
    waiting: deque[Future[_R]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="fpt-fast-images") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
