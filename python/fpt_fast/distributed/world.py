"""What the ranks of one task say to each other."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fpt_fast.distributed.signs_of_life import SignsOfLife

_BYTES_AT_ONCE = 1 << 28
_AT_WORK = "in the midst of the work"


@dataclass(frozen=True, slots=True)
class World:
    """This process among ``size``: ``rank`` 0 writes files and talks to the user.

    ``control`` is the group for tensors on the CPU, None for torch's default group; ``signs``
    tells who is lost.  Every method that speaks to the others must be called by all ranks, in the
    same order, and raises ``LostRank`` where one does not come; ``what`` says when that was.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: ProcessGroup | None = None
    signs: SignsOfLife | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def share(self, count: int, rank: int | None = None) -> range:
        """A rank's (or this one's) contiguous part of ``count`` things; parts differ by one at
        the most."""
        at = self.rank if rank is None else rank
        return range(at * count // self.size, (at + 1) * count // self.size)

    def meet(self, what: str = _AT_WORK) -> None:
        """Wait until every rank is here."""
        self.gather(torch.zeros(0, dtype=torch.int64), what)

    def any(self, yes: bool, what: str = _AT_WORK) -> bool:
        """Whether any rank says yes."""
        if self.size == 1:
            return yes
        answer = torch.tensor([int(yes)])
        with self._watched(what):
            dist.all_reduce(answer, op=dist.ReduceOp.MAX, group=self.control)
        return bool(answer)

    def gather(self, part: Tensor, what: str = _AT_WORK) -> list[Tensor]:
        """Every rank's CPU tensor, in the order of ranks; shapes may differ in the first axis."""
        if self.size == 1:
            return [part]
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(part)
        with self._watched(what):
            dist.all_reduce(lengths, group=self.control)
        return self._gather(part, lengths.tolist(), what)

    def gather_shares(self, part: Tensor, count: int, what: str = _AT_WORK) -> Tensor:
        """The whole [count, ...] of which ``part``, on any device, is this rank's ``share``."""
        if self.size == 1:
            return part
        lengths = [len(self.share(count, rank)) for rank in range(self.size)]
        return torch.cat(self._gather(part, lengths, what))

    def gather_text(self, text: str, what: str = _AT_WORK) -> list[str]:
        """Every rank's text, in the order of ranks."""
        parts = self.gather(_as_tensor(text.encode()), what)
        return [_as_bytes(part).decode() for part in parts]

    def require_same(self, text: str, what: str) -> None:
        """Raise ``ValueError`` on every rank unless all give the same ``text``, which is
        ``what``."""
        given = self.gather_text(text, f"comparing {what}")
        others = [str(rank) for rank, other in enumerate(given) if other != given[0]]
        if others:
            raise ValueError(
                f"all ranks must have the same {what}, got another on rank {', '.join(others)} "
                "than on rank 0; start all of them with the same command on the same files"
            )

    def sum(self, tensor: Tensor, what: str = _AT_WORK) -> Tensor:
        """Replace ``tensor``, on any device, by its sum over the ranks, the same bits on each."""
        if self.size > 1:
            with self._watched(what):
                dist.all_reduce(tensor, group=self._group(tensor))
        return tensor

    def copy_first(self, tensors: Sequence[Tensor], what: str = _AT_WORK) -> None:
        """Replace ``tensors``, on any device, by those of rank 0."""
        self._spread([(tensor, 0) for tensor in tensors], what)

    def bytes_of_first(self, data: bytes | None, what: str = _AT_WORK) -> bytes | None:
        """What rank 0 gives; the others give None."""
        if self.size == 1:
            return data
        # None is told from no bytes by a first byte.
        mine = b"" if data is None or not self.is_first else b"+" + data
        whole = _as_bytes(self.gather(_as_tensor(mine), what)[0])
        return whole[1:] if whole else None

    def fill_shares(self, whole: Tensor, what: str = _AT_WORK) -> None:
        """Fill ``whole`` (contiguous; its first axis shared out) with each rank's own share."""
        count = len(whole)
        parts = [(self.share(count, rank), rank) for rank in range(self.size)]
        self._spread([(whole[part.start : part.stop], rank) for part, rank in parts if part], what)

    def _spread(self, sources: Sequence[tuple[Tensor, int]], what: str) -> None:
        """Replace each tensor by that of its rank."""
        if self.size == 1:
            return
        with self._watched(what):
            for tensor, rank in sources:
                # As bytes: gloo does not know every dtype.
                flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                for start in range(0, len(flat), _BYTES_AT_ONCE):
                    part = flat[start : start + _BYTES_AT_ONCE]
                    dist.broadcast(part, src=rank, group=self._group(part))
                if flat.data_ptr() != tensor.data_ptr():
                    tensor.copy_(flat.view(tensor.dtype).view(tensor.shape))

    def _gather(self, part: Tensor, lengths: Sequence[int], what: str) -> list[Tensor]:
        longest = max(lengths)
        shape = (longest, *part.shape[1:])
        if longest == 0:
            return [part] * self.size
        padded = part.new_zeros(shape)
        padded[: len(part)] = part
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        with self._watched(what):
            dist.all_gather(parts, padded, group=self._group(padded))
        return [whole[:length] for whole, length in zip(parts, lengths, strict=True)]

    def _group(self, tensor: Tensor) -> ProcessGroup | None:
        return self.control if tensor.device.type == "cpu" else None

    @contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if self.signs is None:
                raise
            raise self.signs.explain(what, error) from error


ALONE = World()
"""One process by itself."""


def _as_tensor(data: bytes) -> Tensor:
    if not data:
        return torch.zeros(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
