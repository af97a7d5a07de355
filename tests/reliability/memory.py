"""What memory this process has and keeps, a limit on it, and calls that leave none in it."""

import ctypes
import gc
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Self

from reliability.kills import in_child, was_killed
from reliability.subjects import Broken


class _Malloc(ctypes.Structure):
    """What glibc's ``mallinfo2`` returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"),
            *("fordblks", "keepcost"),
        )
    ]


_libc = ctypes.CDLL(None)
_mallinfo = getattr(_libc, "mallinfo2", None)  # glibc's, from 2.33
_trim = getattr(_libc, "malloc_trim", None)
COUNTS_MALLOC = _mallinfo is not None
if _mallinfo is not None:
    _mallinfo.restype = _Malloc


@dataclass(frozen=True)
class Memory:
    """Memory that a process keeps.

    What leaks is among ``blocks`` or ``in_use``; where ``resident`` alone grows, what was freed
    lies in pieces between what was not.
    """

    blocks: int  # of Python's own allocator, 512 bytes at most each
    in_use: int  # bytes that malloc has given out; 0 where it does not say
    resident: int  # bytes in memory

    @classmethod
    def kept(cls) -> Self:
        """What this process has, with all that was freed given back."""
        gc.collect()
        if _trim is not None:
            _trim(0)
        malloc = _mallinfo() if _mallinfo is not None else _Malloc()
        return cls(
            sys.getallocatedblocks(),
            malloc.uordblks + malloc.hblkhd,
            _pages(1) * resource.getpagesize(),
        )

    def __sub__(self, before: Self) -> "Memory":
        pairs = zip(astuple(self), astuple(before), strict=True)
        return Memory(*(after - at_first for after, at_first in pairs))

    def __str__(self) -> str:
        return (
            f"{self.blocks} blocks of Python's, {self.in_use} bytes of malloc's in use, and "
            f"{self.resident} bytes in memory"
        )


@contextmanager
def limited_memory(growth: int) -> Iterator[None]:
    """Let this process grow by so many bytes: an allocation beyond them is an error."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = _pages(0) * resource.getpagesize() + growth
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def apart(ask: Callable[[], str]) -> str:
    """The answer of a child, forked for it, so that what the asking leaves behind goes with it.

    Raises ``Broken`` where the child fails; its error is on stderr then.
    """
    reads, writes = os.pipe()
    child = in_child(lambda: _tell(writes, ask()))
    os.close(writes)
    try:
        with os.fdopen(reads, encoding="utf-8") as pipe:
            answer = pipe.read()
    except BaseException:  # too late, say
        os.kill(child, signal.SIGKILL)
        with suppress(Broken):
            was_killed(child)
        raise
    if was_killed(child):
        raise Broken("a child was killed, as the kernel kills where memory is short")
    return answer


def _tell(pipe: int, answer: str) -> None:
    with os.fdopen(pipe, "w", encoding="utf-8") as file:
        file.write(answer)


def _pages(place: int) -> int:
    """This process's pages, 0: of addresses, 1: in memory."""
    return int(Path("/proc/self/statm").read_text().split()[place])
