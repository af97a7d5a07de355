"""Helpers that several kernels share."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(ptrs, row_ok, d_ok, MASK_ROWS: tl.constexpr, MASK_WIDTH: tl.constexpr):
    """Rows [BLOCK, PADDED]; what lies outside is 0, and nothing is masked without need."""
    if MASK_ROWS and MASK_WIDTH:
        return tl.load(ptrs, mask=row_ok[:, None] & d_ok[None, :], other=0.0)
    elif MASK_ROWS:
        return tl.load(ptrs, mask=row_ok[:, None], other=0.0)
    elif MASK_WIDTH:
        return tl.load(ptrs, mask=d_ok[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def dot(a_tile, b_tile, UPCAST: tl.constexpr):
    """Product with f32 sums, f32 inputs taken in full; UPCAST serves the interpreter (bf16)."""
    if UPCAST:
        a_tile = a_tile.to(tl.float32)
        b_tile = b_tile.to(tl.float32)
    return tl.dot(a_tile, b_tile, input_precision="ieee")


@triton.jit
def dot_in_steps(
    a_ptrs,
    b_ptrs,
    a_ok,
    b_ok,
    a_stride_d,
    b_stride_d,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    """a bᵀ [BLOCK_A, BLOCK_B] in f32, STEP columns of both at a time, loaded when needed.

    f32 products are sums in registers, of rows that would not fit there whole.
    """
    d_idx = tl.arange(0, STEP)
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for start in range(0, WIDTH, STEP):
        d_ok = d_idx < WIDTH - start
        a_tile = tl.load(a_ptrs, mask=a_ok[:, None] & d_ok[None, :], other=0.0)
        b_tile = tl.load(b_ptrs, mask=b_ok[:, None] & d_ok[None, :], other=0.0)
        total = tl.dot(a_tile, tl.trans(b_tile), total, input_precision="ieee")
        a_ptrs += tl.full((), STEP, tl.int64) * a_stride_d
        b_ptrs += tl.full((), STEP, tl.int64) * b_stride_d
    return total


@triton.jit
def products_with(
    own_tile,
    own_ptrs,
    other_ptrs,
    own_ok,
    other_ok,
    d_ok,
    own_stride_d,
    other_stride_d,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """own otherᵀ [BLOCK_OWN, BLOCK_OTHER] in f32: rows that a program holds with rows that stream.

    Where STEP is PADDED the held rows are ``own_tile``; else both are loaded STEP columns at a
    time, as ``dot_in_steps`` does.
    """
    if STEP == PADDED:
        other_tile = load_rows(other_ptrs, other_ok, d_ok, MASK_ROWS, WIDTH != PADDED)
        products = dot(own_tile, tl.trans(other_tile), UPCAST)
    else:
        products = dot_in_steps(
            own_ptrs,
            other_ptrs,
            own_ok,
            other_ok,
            own_stride_d,
            other_stride_d,
            BLOCK_OWN,
            BLOCK_OTHER,
            WIDTH,
            STEP,
        )
    return products


@triton.jit
def exp_of(x):
    """e to the x, by way of the hardware's powers of two."""
    return tl.exp2(x * LOG2E)


@triton.jit
def finite_max(row_max):
    """Row maxima that can be subtracted: 0 where all logits so far are -Inf, never NaN."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)
