"""``select_tokens``: the keys and values of the ``keep`` highest scores of every head.

``index`` = ascending tokens of the ``keep`` largest ``(key(score), -token)``, and
``kv[:, 0] = k[index]``, ``kv[:, 1] = v[index]``, where ``key`` maps an f32 score to an i32 of the
same order: -0 equals +0 and NaN equals minus infinity.  Keys are made of the bits alone, so that
denormals keep their order whatever the rounding mode.

The ``keep``-th largest key is found by bisection between the smallest and the largest key.  A
step counts the keys above a threshold: N comparisons and one sum over the program.  Four
radix passes of 8 bits would take 4 x 256 bins, the prefix sums of 4 histograms, and
contention in the first, where softmax means share their exponents; bisection takes at most 32
sums, and stops as soon as a threshold splits off exactly ``keep`` keys: 6 to 15 steps at N = 1025
and K = 205 on random attention maps.  Ties go to the lower token by a prefix count, which also
gives each kept token its place.

One launch serves all images and heads.  Where they are too few to fill a GPU, several programs
share a head: each selects, and compacts and copies its own rows.  Selecting again costs
no traffic to speak of (a row of scores comes from the L2 cache); a second launch for the copies
would add its own latency.  None of this has been measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fptkernels import launch_table
from fptkernels.launch_table import SHORT_NAMES, TABLE, CompileSpec, Key, Tile, pad_width

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Enough to keep every multiprocessor of a large GPU busy, few enough to run all at once.
_PROGRAMS = 512

_MINUS_INFINITY = tl.constexpr(-0x7F800001)  # key of -inf, the lowest that a score can have
_NO_TOKEN = tl.constexpr(-0x80000000)  # below every key
_HIGHEST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _load_keys(score_ptr, stride, token_idx, tokens):
    """Order-preserving keys [BLOCK_N] i32 of the scores of ``token_idx``; none behind the end."""
    token_ok = token_idx < tokens
    score_tile = tl.load(score_ptr + token_idx.to(tl.int64) * stride, mask=token_ok, other=0.0)
    bits = score_tile.to(tl.float32).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude - 1, magnitude)
    key = tl.where(magnitude == 0, 0, key)
    key = tl.where(magnitude > 0x7F800000, _MINUS_INFINITY, key)
    return tl.where(token_ok, key, _NO_TOKEN)


@triton.jit
def _keep_th_largest(score_ptr, stride, tokens, keep, first_tile, BLOCK_N: tl.constexpr):
    """A key ``low`` such that exactly the keys above it, and the first ties with it, are kept.

    Also how many ties at most.  ``first_tile`` [BLOCK_N] are the keys of the first tokens: they
    stay in registers, the others are read again in every step.
    """
    block_idx = tl.arange(0, BLOCK_N)
    low_tile = tl.where(first_tile == _NO_TOKEN, _HIGHEST, first_tile)
    high_tile = first_tile
    for start in range(BLOCK_N, tokens, BLOCK_N):
        key_tile = _load_keys(score_ptr, stride, start + block_idx, tokens)
        low_tile = tl.minimum(low_tile, tl.where(key_tile == _NO_TOKEN, _HIGHEST, key_tile))
        high_tile = tl.maximum(high_tile, key_tile)
    low = tl.min(low_tile, axis=0).to(tl.int64)
    high = tl.max(high_tile, axis=0).to(tl.int64)
    at_least_low = tl.zeros((), tl.int32) + tokens
    above_high = tl.zeros((), tl.int32)
    while (low < high) & (at_least_low != keep):
        middle = low + ((high - low + 1) >> 1)
        threshold = middle.to(tl.int32)
        count_tile = (first_tile >= threshold).to(tl.int32)
        for start in range(BLOCK_N, tokens, BLOCK_N):
            key_tile = _load_keys(score_ptr, stride, start + block_idx, tokens)
            count_tile += (key_tile >= threshold).to(tl.int32)
        count = tl.sum(count_tile, axis=0)
        enough = count >= keep
        low = tl.where(enough, middle, low)
        at_least_low = tl.where(enough, count, at_least_low)
        high = tl.where(enough, high, middle - 1)
        above_high = tl.where(enough, above_high, count)
    # Exact where low met high; where the loop stopped early all ties are kept, and it is no less.
    return low.to(tl.int32), keep - above_high


@triton.jit
def _store_index(
    score_ptr,
    stride,
    tokens,
    first_tile,
    low,
    ties,
    index_ptr,
    row_start,
    row_end,
    BLOCK_N: tl.constexpr,
):
    """Write kept tokens, ascending, to rows [row_start, row_end) of ``index_ptr``."""
    block_idx = tl.arange(0, BLOCK_N)
    key_tile = first_tile
    above_before = tl.zeros((), tl.int32)
    ties_before = tl.zeros((), tl.int32)
    for start in range(0, tokens, BLOCK_N):
        if start > 0:
            key_tile = _load_keys(score_ptr, stride, start + block_idx, tokens)
        # One scan counts both inside a block: ties in the upper 16 bits, keys above in the lower.
        is_above = key_tile > low
        is_tie = key_tile == low
        packed = is_above.to(tl.int32) + (is_tie.to(tl.int32) << 16)
        before = tl.cumsum(packed, axis=0) - packed
        tie_rank = ties_before + (before >> 16)
        row_idx = above_before + (before & 0xFFFF) + tl.minimum(tie_rank, ties)
        kept_ok = is_above | (is_tie & (tie_rank < ties))
        row_ok = kept_ok & (row_idx >= row_start) & (row_idx < row_end)
        tl.store(index_ptr + row_idx, start + block_idx, mask=row_ok)
        total = tl.sum(packed, axis=0)
        above_before += total & 0xFFFF
        ties_before += total >> 16


@triton.jit(do_not_specialize=["heads", "tokens", "keep", "rows"])
def select_tokens_kernel(
    score_ptr,
    k_ptr,
    v_ptr,
    kv_ptr,
    index_ptr,
    score_stride_b,
    score_stride_h,
    score_stride_n,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    heads,
    tokens,
    width,
    keep,
    rows,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Program (b * H + h, part) keeps rows [part * rows, (part + 1) * rows) of K for one head."""
    image = (tl.program_id(0) // heads).to(tl.int64)
    head = (tl.program_id(0) % heads).to(tl.int64)
    row_start = tl.program_id(1) * rows
    row_end = tl.minimum(row_start + rows, keep)
    score_ptr += image * score_stride_b + head * score_stride_h
    index_ptr += (image * heads + head) * keep

    first_tile = _load_keys(score_ptr, score_stride_n, tl.arange(0, BLOCK_N), tokens)  # [BLOCK_N]
    low, ties = _keep_th_largest(score_ptr, score_stride_n, tokens, keep, first_tile, BLOCK_N)
    _store_index(
        score_ptr,
        score_stride_n,
        tokens,
        first_tile,
        low,
        ties,
        index_ptr,
        row_start,
        row_end,
        BLOCK_N,
    )
    # Threads read below what others of this program stored above.
    tl.debug_barrier()

    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    kept_k_ptr = kv_ptr + (image * 2 * heads + head) * keep * width
    kept_v_ptr = kv_ptr + ((image * 2 + 1) * heads + head) * keep * width
    width_idx = tl.arange(0, PADDED)[None, :].to(tl.int64)
    width_ok = width_idx < width
    for start in range(row_start, row_end, BLOCK_K):
        row_idx = start + tl.arange(0, BLOCK_K)
        row_ok = row_idx < row_end
        token_idx = tl.load(index_ptr + row_idx, mask=row_ok, other=0).to(tl.int64)[:, None]
        tile_ok = row_ok[:, None] & width_ok
        k_tile = tl.load(
            k_ptr + token_idx * k_stride_n + width_idx * k_stride_d, mask=tile_ok
        )  # [BLOCK_K, PADDED]
        v_tile = tl.load(
            v_ptr + token_idx * v_stride_n + width_idx * v_stride_d, mask=tile_ok
        )  # [BLOCK_K, PADDED]
        if k_tile.dtype != kv_ptr.dtype.element_ty:
            # By way of f32, as torch converts; exact where f32 holds the source or the target.
            k_tile = k_tile.to(tl.float32).to(kv_ptr.dtype.element_ty)
            v_tile = v_tile.to(tl.float32).to(kv_ptr.dtype.element_ty)
        kept_idx = row_idx.to(tl.int64)[:, None] * width + width_idx
        tl.store(kept_k_ptr + kept_idx, k_tile, mask=tile_ok)
        tl.store(kept_v_ptr + kept_idx, v_tile, mask=tile_ok)


def select_tokens(
    scores: Tensor, k: Tensor, v: Tensor, keep: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """scores [B, H, N], k, v [B, H, N, D] -> kv [B, 2, H, K, D] of ``dtype``, index [B, H, K]."""
    batch, heads, tokens, width = k.shape
    kv = k.new_empty((batch, 2, heads, keep, width), dtype=dtype)
    index = scores.new_empty((batch, heads, keep), dtype=torch.int32)
    if batch * heads == 0:
        return kv, index
    tile = launch_table.tile("select_tokens", k.dtype, pad_width(width), k.device)
    parts = min(triton.cdiv(_PROGRAMS, batch * heads), triton.cdiv(keep, tile.block_m))
    rows = triton.cdiv(keep, parts)
    with torch.cuda.device_of(k):
        select_tokens_kernel[(batch * heads, triton.cdiv(keep, rows))](
            scores,
            k,
            v,
            kv,
            index,
            *scores.stride(),
            *k.stride(),
            *v.stride(),
            heads,
            tokens,
            width,
            keep,
            rows,
            BLOCK_N=min(tile.block_n, triton.next_power_of_2(tokens)),
            BLOCK_K=tile.block_m,
            PADDED=pad_width(width),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
    return kv, index


def compile_specs() -> list[CompileSpec]:
    """One per row of the table, and every conversion at D = 64; N only sets loop counts.

    Block sizes are those of N > 1024, hence of 1,025 and of 16,385.
    """
    return [
        _compile_spec(key, tile, target)
        for key, tile in TABLE.items()
        if key[0] == "select_tokens"
        for target in (DTYPES if key[2] == 64 else (key[1],))
    ]


def _compile_spec(key: Key, tile: Tile, target: torch.dtype) -> CompileSpec:
    _, source, padded, architecture = key
    constexprs = {
        "score_stride_n": 1,
        "k_stride_d": 1,
        "v_stride_d": 1,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_m,
        "PADDED": padded,
    }
    source_ptr, target_ptr = f"*{SHORT_NAMES[source]}", f"*{SHORT_NAMES[target]}"
    pointers = {
        "score_ptr": "*fp32",
        "k_ptr": source_ptr,
        "v_ptr": source_ptr,
        "kv_ptr": target_ptr,
        "index_ptr": "*i32",
    }
    names = [name for name in select_tokens_kernel.arg_names if name not in constexprs]
    strides = [name for name in names if name.startswith(("k_stride", "v_stride"))]
    return CompileSpec(
        name=f"select_tokens {SHORT_NAMES[source]}->{SHORT_NAMES[target]} D{padded}",
        kernel=select_tokens_kernel,
        signature={name: pointers.get(name, "i32") for name in names},
        constexprs=constexprs,
        architecture=architecture,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=(*pointers, *strides, "width"),
    )
