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
def exp_of(x):
    """e to the x, by way of the hardware's powers of two."""
    return tl.exp2(x * LOG2E)


@triton.jit
def finite_max(row_max):
    """Row maxima that can be subtracted: 0 where all logits are -Inf so far (-Inf - -Inf is NaN)."""
    return tl.where(row_max == float("-inf"), 0.0, row_max)
