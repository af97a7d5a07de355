"""A cache that the ranks of a task build together: rank 0 as its builder, the others help."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from fpt_fast.cache.encode import Quantise, RecordMaker, layer_names
from fpt_fast.cache.format import DIGEST_BYTES, Fingerprint, normalised
from fpt_fast.cache.helper import HelpingWriter, plan_digest
from fpt_fast.cache.layout import RecordLayout
from fpt_fast.cache.writer import CacheWriter
from fpt_fast.distributed import World
from fpt_fast.records import SelectedTokens

_ROW_BYTES = 8


class SharedWriter:
    """A ``CacheWriter`` in the hands of all ranks of ``world``; alone, it is just that.

    Every method but ``close`` is to be called by all ranks together, and raises ``LostRank`` where
    one does not come.  ``pending`` are the positions in ``keys`` whose records are still to be
    written, ascending.
    """

    def __init__(
        self,
        world: World,
        path: Path,
        layout: RecordLayout,
        fingerprint: Fingerprint,
        keys: Sequence[str],
        *,
        digests: Sequence[str] | None = None,
        notes: Mapping[str, Any] | None = None,
        quantise: Quantise | None = None,
    ) -> None:
        self._world = world
        self._writer: CacheWriter | None = None
        self._helper: HelpingWriter | None = None
        if world.is_first:
            self._writer = CacheWriter(
                path, layout, fingerprint, keys, digests=digests, notes=notes, quantise=quantise
            )
        try:
            names = layer_names(layout, normalised(fingerprint))
            self.pending = self._open(path, RecordMaker(layout, keys, names, quantise))
        except BaseException:
            self.close()
            raise

    def write(self, positions: Sequence[int], tokens: SelectedTokens | None) -> int:
        """Write this rank's records of ``positions`` (none: ``[]`` and None), and make those of
        all ranks count; returns how many were new.  Raises as ``CacheWriter.write``."""
        written: list[tuple[int, bytes]] = []
        if self._helper is not None and tokens is not None:
            written = self._helper.write(positions, tokens)
        packed = b"".join(row.to_bytes(_ROW_BYTES, "little") + digest for row, digest in written)
        entry = torch.frombuffer(bytearray(packed), dtype=torch.uint8) if packed else _nothing()
        parts = self._world.gather(entry.view(-1, _ROW_BYTES + DIGEST_BYTES), "writing the cache")
        others = [
            (int.from_bytes(line[:_ROW_BYTES], "little"), line[_ROW_BYTES:])
            for part in parts
            for line in (row.numpy().tobytes() for row in part)
        ]
        own = 0
        if self._writer is not None:
            own = sum(not self._writer.is_done(position) for position in positions)
            self._writer.write_beside(positions, tokens, others)
        return own + len(others)

    def finish(self) -> None:
        """Complete the cache; as ``CacheWriter.finish``."""
        if self._writer is not None:
            self._writer.finish()
        self._world.meet("finishing the cache")

    def close(self) -> None:
        """Keep what was written, and let others build."""
        if self._writer is not None:
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, path: Path, maker: RecordMaker) -> list[int]:
        """Tell the helpers what to write, and where; returns the pending positions."""
        if self._world.size == 1 and self._writer is not None:
            return self._writer.pending
        rows: list[tuple[int, int]] = []
        owner = plan = b""
        if self._writer is not None:
            rows = [(position, self._writer.rows[position]) for position in self._writer.pending]
            owner, plan = self._writer.owner or b"", plan_digest(path)
        what = "opening the cache"
        owner = self._world.bytes_of_first(owner, what) or b""
        plan = self._world.bytes_of_first(plan, what) or b""
        mine = torch.tensor(rows, dtype=torch.int64).view(-1, 2)
        row_of: dict[int, int] = dict(self._world.gather(mine, what)[0].tolist())
        if self._writer is None and row_of:
            self._helper = HelpingWriter(path, maker, row_of, owner, plan)
        return list(row_of)


def _nothing() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.uint8)
