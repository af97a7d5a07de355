"""The order of copies and work on a device: two streams, and events between them.

``Streams`` is all that staging knows of a device, so that a simulation of it can prove that no
buffer is used too early (``tests/tiers/simulation.py``).  ``CudaStreams`` is the real one.
"""

import weakref
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Mark(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether all work before it is done."""
        ...

    def synchronize(self) -> None:
        """Wait until it is."""
        ...


class Streams(Protocol):
    """Copies to a device run in one stream, the model's work in another; both run behind the
    caller, each in its own order."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory on the device, for copies as well as for work."""
        ...

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the device already."""
        ...

    def pinned(self, count: int) -> NDArray[np.uint8]:
        """``count`` bytes of host memory that copies can be made from in the background."""
        ...

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy host memory to the device, after the copies before it."""
        ...

    def copied(self) -> Mark:
        """The point after all copies so far."""
        ...

    def used(self) -> Mark:
        """The point after all work so far."""
        ...

    def hold_copies(self, mark: Mark) -> None:
        """Copies asked for from now on wait for ``mark``."""
        ...

    def hold_work(self, mark: Mark) -> None:
        """Work asked for from now on waits for ``mark``."""
        ...


class CudaStreams:
    """Copies in a stream of their own, work in the caller's current stream of ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the caching allocator; copies wait for whoever had it before."""
        made = torch.empty(shape, dtype=dtype, device=self._device)
        self.hold_copies(self.used())
        return made

    def holds(self, tensor: Tensor) -> bool:
        """Whether it is on a GPU: there is one here."""
        return tensor.device.type == self._device.type

    def pinned(self, count: int) -> NDArray[np.uint8]:
        """Memory of exactly that size (torch's own allocator rounds up to powers of 2)."""
        memory = np.empty(count, np.uint8)
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        address = memory.ctypes.data
        code = int(runtime.cudaHostRegister(address, count, 0))
        if code:
            raise RuntimeError(
                f"cannot pin {count} bytes of host memory (CUDA error {code}); is there a limit "
                "of locked memory (ulimit -l)? Use --features-on disk, or fewer --workers"
            )
        weakref.finalize(memory, runtime.cudaHostUnregister, address).atexit = False
        return memory

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Returns at once where ``source`` is pinned."""
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)

    def copied(self) -> Mark:
        """An event in the stream of copies."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._copies)
        mark: Mark = event
        return mark

    def used(self) -> Mark:
        """An event in the caller's stream."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        mark: Mark = event
        return mark

    def hold_copies(self, mark: Mark) -> None:
        """The stream of copies waits."""
        self._copies.wait_event(mark)  # type: ignore[arg-type]

    def hold_work(self, mark: Mark) -> None:
        """The caller's stream waits."""
        torch.cuda.current_stream(self._device).wait_event(mark)  # type: ignore[arg-type]
