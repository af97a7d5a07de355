"""Which rank is gone, and why: asked only once an exchange between ranks has failed.

Every rank counts up a number of its own in the store that all ranks share, and leaves its error
there when it ends with one.  A rank whose number stands still is gone.
"""

import threading
import time

from torch.distributed.distributed_c10d import Store

# A thread that only counts is late by this much on the most crowded of machines.
_BEAT_SECONDS = 0.5
_STILL_SECONDS = 3.0
_GRACE_SECONDS = 2.0
_LONGEST_REASON = 500


class LostRank(RuntimeError):
    """Another process of this task is gone; says which, and how to go on."""


class SignsOfLife:
    """Shows that this rank is alive, until ``stop``, and tells which others are not."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._beats = 0
        self._stopped = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="fpt-rank", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Show nothing any more."""
        self._stopped.set()
        self._thread.join()

    def leave_reason(self, error: BaseException) -> None:
        """Tell the other ranks that this one ends with ``error``."""
        kind = "lost" if isinstance(error, LostRank) else f"failed/{self._rank}"
        text = str(error) or type(error).__name__
        try:
            self._store.set(kind, text[:_LONGEST_REASON])
            self._store.set(f"ended/{self._rank}", "")
        except RuntimeError:
            return  # the store went with its rank: the others know as much

    def linger(self) -> None:
        """Wait until the others had the time to read why this rank, which holds the store, ends."""
        others = [f"ended/{rank}" for rank in range(self._size) if rank != self._rank]
        deadline = time.monotonic() + _STILL_SECONDS + _GRACE_SECONDS
        while time.monotonic() < deadline and not self._store.check(others):
            time.sleep(0.05)

    def explain(self, what: str, error: RuntimeError) -> LostRank:
        """The error of a rank whose exchange with the others failed with ``error`` ``what``."""
        advice = (
            "look at its own output for the reason, then start all of them again: finished work "
            "is kept"
        )
        try:
            if self._store.check(["lost"]):
                return LostRank(_text(self._store, "lost"))
            told = self._told()
            gone = [] if told else self._still()
            told = told or self._told()
        except RuntimeError:
            # Without torchrun it is rank 0 that holds the store.
            return LostRank(f"rank 0 of {self._size} was lost {what}; {advice}")
        if told:
            return LostRank("; ".join(told) + "; then start all of them again")
        if gone:
            names = ", ".join(map(str, gone))
            ranks = f"rank {names} was" if len(gone) == 1 else f"ranks {names} were"
            return LostRank(f"{ranks} lost {what}, of {self._size}; {advice}")
        first = (str(error).strip().splitlines() or [""])[0]
        return LostRank(
            f"the {self._size} ranks lost each other {what}, though all are alive: is one of them "
            f"hanging, or the network down? ({first})"
        )

    def _told(self) -> list[str]:
        keys = {rank: f"failed/{rank}" for rank in range(self._size) if rank != self._rank}
        return [
            f"rank {rank} of {self._size} ended with: {_text(self._store, key)}"
            for rank, key in keys.items()
            if self._store.check([key])
        ]

    def _still(self) -> list[int]:
        """Ranks that show no sign of life for a while."""
        before = self._numbers()
        time.sleep(_STILL_SECONDS)
        now = self._numbers()
        return [rank for rank in range(self._size) if before[rank] == now[rank]]

    def _numbers(self) -> list[str]:
        return [_text(self._store, f"alive/{rank}") for rank in range(self._size)]

    def _beat(self) -> None:
        self._beats += 1
        self._store.set(f"alive/{self._rank}", str(self._beats))

    def _run(self) -> None:
        while not self._stopped.wait(_BEAT_SECONDS):
            try:
                self._beat()
            except RuntimeError:
                return  # the store is gone, and with it this task


def _text(store: Store, key: str) -> str:
    return store.get(key).decode(errors="replace")
