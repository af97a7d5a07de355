"""A small cache with features that depend on the position alone, for every test of the cache."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fpt_fast.cache import CacheWriter, RecordLayout
from fpt_fast.ops import quantise_kv
from fpt_fast.records import SelectedTokens

LAYOUT = RecordLayout(layers=2, heads=3, kept=5, head_width=4)
DTYPES = ("float16", "int8", "float8_e4m3fn")
# By dtype; the numbers of elements are odd, so that parts of a record have gaps between them.
LAYOUTS = {
    dtype: replace(LAYOUT, layers=1, heads=3, kept=5, head_width=3, dtype=dtype) for dtype in DTYPES
}
FINGERPRINT = {"backbone": "tiny", "layers": (6, 7), "token_ratio": 0.2, "size": {"height": 32}}


def keys(count: int) -> list[str]:
    """``count`` keys; the files' names repeat in other folders."""
    return [f"class_{i % 2}/image {i // 2}.png" for i in range(count)]


def tokens(positions: Sequence[int], layout: RecordLayout = LAYOUT) -> SelectedTokens:
    """Features of ``positions``, the same ones each time; of the layout's dtype."""
    kv = [
        torch.randn(layout.kv_shape, generator=torch.Generator().manual_seed(position))
        for position in positions
    ]
    index = [
        torch.arange(layout.kept, dtype=torch.int32).expand(layout.index_shape) * 3 + position
        for position in positions
    ]
    half = torch.stack(kv).half()
    if not layout.has_scales:
        return SelectedTokens(half, torch.stack(index))
    kv8, k_scales, v_scales = quantise_kv(half, getattr(torch, layout.dtype))
    return SelectedTokens(kv8, torch.stack(index), k_scales, v_scales)


def quantiser(layout: RecordLayout) -> partial[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What a writer of this 8-bit layout makes its records with."""
    return partial(quantise_kv, dtype=getattr(torch, layout.dtype))


def assert_tokens_equal(left: SelectedTokens, right: SelectedTokens) -> None:
    """Bit-equal, scales included; either both have them or neither."""
    for name in ("kv", "index", "k_scales", "v_scales"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape, name
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


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
