"""A small cache with features that depend on the position alone, for every test of the cache."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fpt_fast.cache import CacheWriter, RecordLayout
from fpt_fast.records import SelectedTokens

LAYOUT = RecordLayout(layers=2, heads=3, kept=5, head_width=4)
FINGERPRINT = {"backbone": "tiny", "layers": (6, 7), "token_ratio": 0.2, "size": {"height": 32}}


def keys(count: int) -> list[str]:
    """``count`` keys; the files' names repeat in other folders."""
    return [f"class_{i % 2}/image {i // 2}.png" for i in range(count)]


def tokens(positions: Sequence[int], layout: RecordLayout = LAYOUT) -> SelectedTokens:
    """Features of ``positions``, the same ones each time; f16."""
    kv = [
        torch.randn(layout.kv_shape, generator=torch.Generator().manual_seed(position))
        for position in positions
    ]
    index = [
        torch.arange(layout.kept, dtype=torch.int32).expand(layout.index_shape) * 3 + position
        for position in positions
    ]
    return SelectedTokens(torch.stack(kv).half(), torch.stack(index))


def build_cache(
    path: Path,
    count: int = 6,
    *,
    records_per_shard: int | None = None,
    layout: RecordLayout = LAYOUT,
) -> Path:
    """A finished cache of ``count`` records, built in one go."""
    with CacheWriter(
        path, layout, FINGERPRINT, keys(count), records_per_shard=records_per_shard
    ) as writer:
        writer.write(range(count), tokens(range(count), layout))
        writer.finish()
    return path


def all_bytes(path: Path) -> dict[str, bytes]:
    """Every file of a directory, by name."""
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def flip(file: Path, offset: int, mask: int = 0x10) -> None:
    """Change bits of one byte in place; a negative offset counts from the end."""
    with file.open("r+b") as stream:
        stream.seek(offset, 0 if offset >= 0 else 2)
        value = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([value ^ mask]))
