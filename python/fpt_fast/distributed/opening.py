"""Finding out who else works at this task, and meeting them."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store, _get_default_store
from torch.distributed.rendezvous import rendezvous

from fpt_fast.distributed.signs_of_life import SignsOfLife
from fpt_fast.distributed.world import ALONE, World

# A rank that dies is noticed at once.  This is for one that hangs, or whose machine loses power;
# until then, a slow disk may hold one back.
_PATIENCE_SECONDS = 1800.0

# torchrun sets it: the store is the launcher's, else it is rank 0's.
_USES_AGENT = "TORCHELASTIC_USE_AGENT_STORE"

# The store of a task lives as long as its processes: worlds are opened in it one after another.
_stores: dict[tuple[str | None, ...], tuple[Store, int]] = {}


def is_first_process() -> bool:
    """Whether this process is alone or rank 0, by its environment."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def processes_here() -> int:
    """How many processes of this task share this machine, by the environment."""
    return max(1, _number("LOCAL_WORLD_SIZE", 1))


def refuse_several(what: str) -> None:
    """Raise ``ValueError`` where there are several processes, for ``what`` one process does."""
    if _number("WORLD_SIZE", 1) > 1:
        raise ValueError(
            f"{what} is the work of one process, and WORLD_SIZE says that there are "
            f"{_number('WORLD_SIZE')}; start it without torchrun"
        )


@contextmanager
def open_world(
    device: str | torch.device = "auto", *, patience: float = _PATIENCE_SECONDS
) -> Iterator[World]:
    """The world that ``torchrun`` (or SLURM with the same variables) describes.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; without WORLD_SIZE, or with 1,
    nothing is started.  A process group that the caller has started is used and left alone.
    On CUDA ``device`` each process takes the GPU of its LOCAL_RANK.  ``patience``: seconds that a
    rank is waited for that neither comes nor dies.  Ranks but the first log errors alone.

    Raises ``ValueError`` where the variables, or the device, do not fit together, and at the end
    ``LostRank`` where another rank did not come that far.
    """
    if dist.is_available() and dist.is_initialized():
        size, rank, started = dist.get_world_size(), dist.get_rank(), True
    else:
        size, started = _number("WORLD_SIZE", 1), False
        rank = 0 if size == 1 else _number("RANK")
    if size == 1:
        yield ALONE
        return
    local_rank = _number("LOCAL_RANK", 0)
    if not 0 <= rank < size:
        raise ValueError(f"RANK must be 0 to WORLD_SIZE - 1 = {size - 1}, got {rank}")
    on_cuda = _take_device(device, local_rank)
    failed: SignsOfLife | None = None
    try:
        with _process_group(rank, size, on_cuda, started, patience) as (control, store):
            signs = SignsOfLife(store, rank, size)
            world = World(rank, size, local_rank, control, signs)
            try:
                world.meet("at the start")
                with _quiet(world):
                    yield world
                world.meet("at the end")
            except BaseException as error:
                failed = signs
                signs.leave_reason(error)
                raise
            finally:
                signs.stop()
    finally:
        # The others learn that this rank is gone when its process group is.
        if failed is not None and rank == 0 and _USES_AGENT not in os.environ:
            failed.linger()


def _take_device(device: str | torch.device, local_rank: int) -> bool:
    """Make the GPU of ``local_rank`` the current one; False where ``device`` is the CPU."""
    text = str(device)
    if not torch.cuda.is_available() or not text.startswith(("auto", "cuda")):
        return False
    if ":" in text:
        raise ValueError(
            f"with several processes each takes the GPU of its LOCAL_RANK, got device {text!r}; "
            "say cuda or auto"
        )
    count = torch.cuda.device_count()
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        return True  # the launcher shows each process its own
    if local_rank >= count:
        raise ValueError(
            f"LOCAL_RANK must be below the {count} GPUs that this process sees, got {local_rank}; "
            "start one process a GPU, or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return True


@contextmanager
def _process_group(
    rank: int, size: int, on_cuda: bool, started: bool, patience: float
) -> Iterator[tuple[ProcessGroup | None, Store]]:
    """The group for tensors on the CPU (None: the default one), and a store of this world's own."""
    store = _next_store(rank, size, patience, started)
    timeout = timedelta(seconds=patience)
    if not started:
        # Control data on the CPU, gradients where they are.
        dist.init_process_group(
            "nccl" if on_cuda else "gloo",
            store=PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=timeout,
        )
    control = None
    try:
        if dist.get_backend() != "gloo":
            group = dist.new_group(backend="gloo", timeout=timeout)
            control = group if isinstance(group, ProcessGroup) else None
        yield control, PrefixStore("ranks", store)
    finally:
        if not started:
            dist.destroy_process_group()
        elif control is not None:
            dist.destroy_process_group(control)


def _next_store(rank: int, size: int, patience: float, started: bool) -> Store:
    """Where the ranks find each other, under a name that no earlier world of theirs has used."""
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    key = tuple(os.environ.get(name) for name in names)
    store, opened = _stores.get(key, (None, 0))
    if started:
        store = _get_default_store()
    elif store is None:
        timeout = timedelta(seconds=patience)
        store, _, _ = next(rendezvous("env://", rank, size, timeout=timeout))
    _stores[key] = store, opened + 1
    return PrefixStore(f"fpt_fast/{opened}", store)


@contextmanager
def _quiet(world: World) -> Iterator[None]:
    """What the first rank says once need not be said by all."""
    logger = logging.getLogger("fpt_fast")
    before = logger.level
    if not world.is_first:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


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
