"""Several processes at one task, as ``torchrun`` starts them; one process alone is a world of one.

Only tensors travel, never pickled objects.  Collectives of control data run over gloo on the CPU,
so that they work and can name a lost rank whatever the device; gradients go over the device's own
backend.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

# How long a rank is waited for.  Ranks meet once a batch or step; a slow disk may take a while.
_PATIENCE_SECONDS = 600.0


class LostRank(RuntimeError):
    """Another process of this task is gone; says which, and how to go on."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among ``size``: ``rank`` 0 writes files and talks to the user."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    patience: float = _PATIENCE_SECONDS

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's contiguous part of ``count`` things; parts differ by one at the most."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def meet(self, what: str) -> None:
        """Wait until every rank is here; raises ``LostRank`` naming those that do not come."""
        if self.size == 1:
            return
        try:
            dist.monitored_barrier(timeout=timedelta(seconds=self.patience), wait_all_ranks=True)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[0]
            raise LostRank(
                f"a process of this task was lost {what} ({first}); look at its own output for the "
                "reason, then start all of them again: finished work is kept"
            ) from error

    def gather(self, part: Tensor) -> list[Tensor]:
        """Every rank's CPU tensor, in the order of ranks; shapes may differ in the first axis."""
        if self.size == 1:
            return [part]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(part)]))
        longest = max(int(size) for size in sizes)
        padded = part.new_zeros((longest, *part.shape[1:]))
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [whole[: int(size)] for whole, size in zip(parts, sizes, strict=True)]

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor``, on any device, by its sum over the ranks, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def open_world(*, patience: float = _PATIENCE_SECONDS) -> Iterator[World]:
    """The world that ``torchrun`` (or SLURM with the same variables) describes.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without WORLD_SIZE, or with 1,
    nothing is started.  A process group that the caller has started is used and left alone.
    Raises ``ValueError`` where the variables do not fit together.
    """
    if dist.is_available() and dist.is_initialized():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        yield World(dist.get_rank(), dist.get_world_size(), local, patience)
        return
    size = _number("WORLD_SIZE", 1)
    if size == 1:
        yield World(patience=patience)
        return
    rank = _number("RANK")
    world = World(rank, size, _number("LOCAL_RANK", 0), patience)
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be 0 to WORLD_SIZE - 1 = {size - 1}, got {rank}")
    # Control data on the CPU, gradients where they are.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=patience))
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdecimal():
        raise ValueError(
            f"{name} must be a whole number where WORLD_SIZE says that there are several "
            f"processes, got {text!r}; start them with torchrun"
        )
    return int(text)
