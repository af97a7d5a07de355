"""A device in simulation: copies and work are queued, and run as late as they may, or as early.

Memory is poisoned while it is written to and when it comes back to a pool, so that whatever is read
too early, or overwritten too early, shows.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SimulatedMark:
    """Done once ``count`` tasks of ``queue`` have run."""

    def __init__(self, device: "SimulatedStreams", queue: str, count: int) -> None:
        self._device, self._queue, self._count = device, queue, count

    def query(self) -> bool:
        return self._device.done[self._queue] >= self._count

    def synchronize(self) -> None:
        while not self.query():
            assert self._device.run_one(self._queue), "a wait that never ends"


class SimulatedStreams:
    """``Streams`` without a device.  ``rng``: run what may run at random moments, so that every
    order that the marks allow can happen; None: nothing runs until somebody waits for it."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self.rng = rng
        self.queues: dict[str, list[tuple[Callable[[], None], list[SimulatedMark]]]] = {
            "copies": [],
            "work": [],
        }
        self.done = {"copies": 0, "work": 0}
        self.held: dict[str, list[SimulatedMark]] = {"copies": [], "work": []}
        self.on_device: set[int] = set()
        self.buffers: list[NDArray[np.uint8]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        made = torch.empty(shape, dtype=dtype)
        poison(made)
        self.on_device.add(made.untyped_storage().data_ptr())
        self.hold_copies(self.used())
        return made

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.on_device

    def pinned(self, count: int) -> NDArray[np.uint8]:
        # Kept for ever, so that a copy may look at it by its address when its owner is gone.
        self.buffers.append(np.full(count, 0x7F, np.uint8))
        return self.buffers[-1][:]

    def copy(self, target: Tensor, source: Tensor) -> None:
        assert self.holds(target) and not self.holds(source)
        assert source.is_contiguous() and target.is_contiguous()
        address, length = source.data_ptr(), source.nbytes
        # As a device does: it knows the address, and keeps nothing alive.
        memory, start = self._find(address, length)

        def run() -> None:
            poison(target)
            values = torch.from_numpy(memory[start : start + length])
            target.view(-1).view(torch.uint8).copy_(values)

        self.queue("copies", run)

    def _find(self, address: int, length: int) -> tuple[NDArray[np.uint8], int]:
        for buffer in self.buffers:
            start = address - buffer.ctypes.data
            if start >= 0 and start + length <= len(buffer):
                return buffer, start
        raise AssertionError("a copy from memory that is not pinned makes its caller wait")

    def copied(self) -> SimulatedMark:
        return self._mark("copies")

    def used(self) -> SimulatedMark:
        return self._mark("work")

    def hold_copies(self, mark: SimulatedMark) -> None:
        self.held["copies"].append(mark)

    def hold_work(self, mark: SimulatedMark) -> None:
        self.held["work"].append(mark)

    def queue(self, name: str, task: Callable[[], None]) -> None:
        """Add a task to one of the two streams, behind the marks that it is held by."""
        self.queues[name].append((task, list(self.held[name])))
        self.stir()

    def stir(self) -> None:
        """Let time pass: some of what may run runs."""
        if self.rng is not None:
            for _ in range(self.rng.randrange(6)):
                self.run_one(self.rng.choice(("copies", "work")))

    def run_one(self, name: str) -> bool:
        """Run the next task of a stream, and before it what that waits for; False without one."""
        if self.done[name] >= len(self.queues[name]):
            return False
        task, marks = self.queues[name][self.done[name]]
        for mark in marks:
            mark.synchronize()
        task()
        self.done[name] += 1
        return True

    def finish(self) -> None:
        """Run all that is left."""
        while self.run_one("work") or self.run_one("copies"):
            pass

    def _mark(self, name: str) -> SimulatedMark:
        return SimulatedMark(self, name, len(self.queues[name]))


class AtOnce(SimulatedStreams):
    """Work is done by the caller at once, copies at the last moment: a model on the CPU can learn
    from what was staged."""

    def hold_work(self, mark: SimulatedMark) -> None:
        mark.synchronize()


def poison(tensor: Tensor) -> None:
    """Values that no feature has."""
    tensor.view(-1).view(torch.uint8).fill_(0x7F)
