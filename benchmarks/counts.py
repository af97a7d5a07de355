"""What each op must do at least, counted once for every benchmark, and how fast a device could.

Bytes are of the op's own tensors, each read or written once.  A multiplication and an addition
are two operations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from benchmarks.cases import FrozenCase, PromptCase


@dataclass(frozen=True)
class Count:
    """Operations, bytes moved, exponentials; ``out_bytes`` of the bytes are results."""

    flops: int
    bytes: int
    exponentials: int = 0
    out_bytes: int = 0


@dataclass(frozen=True)
class Ceilings:
    """Of one device, a second: bytes copied (read and written), operations by dtype, exponentials.

    What is 0 or missing is unknown and bounds nothing.
    """

    bandwidth: float = 0.0
    flops: Mapping[str, float] = field(default_factory=dict)
    exponentials: float = 0.0


# DESIGN.md section 6: 16 images' column means at N = 1025 are 51 µs of exponentials.
H200 = Ceilings(4.3e12, {"float16": 790e12, "bfloat16": 790e12}, 12 * 1025**2 / 3.2e-6)


def floor_seconds(count: Count, ceilings: Ceilings, dtype: str) -> float:
    """No version that does the counted work can take less: the largest of its three times."""
    times = (
        (count.bytes, ceilings.bandwidth),
        (count.flops, ceilings.flops.get(dtype, 0.0)),
        (count.exponentials, ceilings.exponentials),
    )
    return max(work / rate if rate else 0.0 for work, rate in times)


def token_scores(case: FrozenCase, dtype: torch.dtype, passes: int, queries: int = 0) -> Count:
    """``passes`` products with the map and its exponentials, of ``queries`` rows (0: all)."""
    rows = case.images * case.heads * (queries or case.tokens)
    read = case.images * case.heads * (case.tokens + (queries or case.tokens)) * case.width
    out = 4 * case.images * case.heads * case.tokens
    lse = out if passes == 1 and not queries else 0
    return Count(
        flops=2 * passes * rows * case.tokens * case.width,
        bytes=read * dtype.itemsize + lse + out,
        exponentials=passes * rows * case.tokens,
        out_bytes=out,
    )


def attention(case: FrozenCase, dtype: torch.dtype, products: int, passes: int) -> Count:
    """A frozen layer's attention: ``products`` with the map, ``passes`` of exponentials."""
    one = case.images * case.heads * case.tokens * case.width * dtype.itemsize
    lse = 4 * case.images * case.heads * case.tokens
    return Count(
        flops=products * case.map_flops,
        bytes=4 * one + lse,
        exponentials=passes * case.map_exponentials,
        out_bytes=one + lse,
    )


def select_tokens(case: FrozenCase, dtype: torch.dtype, copies: torch.dtype) -> Count:
    """Kept keys and values are read and written once; scores are read, the index is written."""
    rows = case.images * case.heads * case.keep
    scores = 4 * case.images * case.heads * case.tokens
    written = 2 * rows * case.width * copies.itemsize + 4 * rows
    return Count(0, 2 * rows * case.width * dtype.itemsize + scores + written, 0, written)


def quantise_kv(case: PromptCase, dtype: torch.dtype) -> Count:
    """Read once and written once, with its scales; a maximum, a product and a rounding each."""
    values = case.kv_bytes(dtype) // dtype.itemsize
    rows = case.images * case.layers * case.heads
    written = values + 4 * rows * (case.width + case.kept)
    return Count(3 * values, values * dtype.itemsize + written, 0, written)


def prompt_attention(
    case: PromptCase, dtype: torch.dtype, kv_dtype: torch.dtype, forward: bool, backward: bool
) -> Count:
    """Features are read once in each direction; two products forward, three backward."""
    rows = case.layers * case.heads * case.prompts
    queries = rows * case.width * dtype.itemsize
    outs = case.images * queries
    lse = 4 * case.images * rows
    kv = case.kv_bytes(kv_dtype)
    if kv_dtype.itemsize == 1:
        kv += 4 * case.images * case.layers * case.heads * (case.width + case.kept)
    moved = forward * (kv + queries + outs + lse) + backward * (kv + 2 * outs + lse + 2 * queries)
    return Count(
        flops=(2 * forward + 3 * backward) * case.forward_flops // 2,
        bytes=moved,
        exponentials=(forward + backward) * case.images * rows * case.kept,
        out_bytes=forward * (outs + lse) + backward * queries,
    )


def side_attention(heads: int, queries: int, tokens: int, width: int) -> Count:
    """f32 both ways: two products forward, five backward, of which one is the first again."""
    one, other = 4 * heads * queries * width, 4 * heads * tokens * width
    softmax = 8 * heads * queries
    results = 2 * one + 2 * other
    return Count(
        flops=7 * 2 * heads * queries * tokens * width,
        bytes=(2 * one + 2 * other + softmax) + (3 * one + 2 * other + softmax) + one + 2 * other,
        exponentials=2 * heads * queries * tokens,
        out_bytes=results + softmax,
    )


def frozen_linear(rows: int, depth: int, columns: int, dtype: torch.dtype, added: bool) -> Count:
    """Everything is read and written once; with ``added``, a residual too."""
    out = rows * columns * dtype.itemsize
    read = (rows * depth + depth * columns + columns) * dtype.itemsize + added * out
    return Count(flops=2 * rows * depth * columns, bytes=read + out, exponentials=0, out_bytes=out)


def clipped_adam(values: int) -> Count:
    """f32: gradients twice, for the norm too; parameters and moments there and back."""
    out = 3 * 4 * values
    return Count(flops=16 * values, bytes=2 * 4 * values + 2 * out, exponentials=0, out_bytes=out)


def trained_linear(rows: int, depth: int, columns: int, between: bool = False) -> Count:
    """Both ways, the input read twice: f32 without a gradient, or, ``between`` other maps, bf16
    with one."""
    inputs = (2 if between else 4) * rows * depth
    weights, outs, gradient = 4 * columns * (depth + 1), 4 * rows * columns, inputs * between
    return Count(
        flops=(2 + between) * 2 * rows * depth * columns,
        bytes=2 * inputs + 2 * weights + 2 * outs + gradient,
        exponentials=0,
        out_bytes=weights + outs + gradient,
    )


def side_block_linear(
    images: int, tokens: int, prompts: int, queries: int, width: int, hidden: int
) -> int:
    """Operations of the forward's linear maps; the backward has twice as many."""
    some, every = images * queries, images * (tokens + prompts)
    return 2 * width * (some * (2 * width + 2 * hidden) + every * 2 * width)


def side_block(images: int, tokens: int, prompts: int, width: int, hidden: int) -> Count:
    """f32 both ways: tokens, prompts, weights and their gradients; attention as above."""
    rows, every = images * tokens, images * (tokens + prompts)
    weights = 4 * width * width + 2 * width * hidden + 9 * width + hidden
    linear = 3 * side_block_linear(images, tokens, prompts, tokens, width, hidden)
    return Count(
        flops=linear + 7 * 2 * rows * (tokens + prompts) * width,
        bytes=4 * (3 * every * width + 4 * rows * width + 3 * weights),
        exponentials=2 * rows * (tokens + prompts),
        out_bytes=4 * (every * width + rows * width + weights),
    )
