"""What prompt_attention multiplies: stored tokens in a dtype of tensor cores, f32 in parts of it.

Keys and values are exact in 16 bits (8-bit ones in f16), so that a product with them costs no
accuracy.  f32 queries, probabilities and gradients are split into sums of 16-bit numbers, one
product each: f32 on tensor cores, at a multiple of the speed of f32 arithmetic outside them.
"""

import triton
import triton.language as tl

# Factor of what is rounded to 16 bits: far above the subnormal f16, far below the largest.
HEADROOM = tl.constexpr(4096.0)


@triton.jit
def program_place(heads, layers, prompts, BLOCK_P: tl.constexpr):
    """Image (or split), layer and head of this program, 64-bit, and its prompts.

    Prompt blocks that share tokens are neighbours, then come the heads of one record.
    """
    program = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(prompts, BLOCK_P)
    p_idx = program % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    head = program // blocks % heads
    layer = program // (blocks * heads) % layers
    return program // (blocks * heads * layers), layer, head, p_idx


@triton.jit
def kept_tokens(index_ptr, start, kept, BLOCK_K: tl.constexpr):
    """Where the kept tokens ``start…`` stand, 64-bit, and which of them exist."""
    k_idx = start + tl.arange(0, BLOCK_K)
    k_ok = k_idx < kept
    if index_ptr is None:
        return k_idx.to(tl.int64), k_ok
    else:
        return tl.load(index_ptr + k_idx, mask=k_ok, other=0).to(tl.int64), k_ok


@triton.jit
def load_as(head_ptr, token_idx, d_idx, stride_n, stride_d, ok, DOT: tl.constexpr):
    """Keys or values [BLOCK_K, BLOCK_D] of one head; uint8 holds the bits of an e4m3."""
    raw = tl.load(head_ptr + token_idx[:, None] * stride_n + d_idx[None, :] * stride_d, ok, 0.0)
    if raw.dtype == tl.uint8:
        # Of an f16 with the same fields, whose exponent has a bias higher by 8.
        bits = ((raw & 0x80).to(tl.int16) << 8) | ((raw & 0x7F).to(tl.int16) << 7)
        value = bits.to(tl.float16, bitcast=True) * 256.0
        return tl.where((raw & 0x7F) == 0x7F, float("nan"), value).to(DOT)
    elif raw.dtype == tl.float8e5:  # the upper byte of an f16
        bits = raw.to(tl.uint8, bitcast=True).to(tl.int16) << 8
        return bits.to(tl.float16, bitcast=True).to(DOT)
    elif raw.dtype == tl.float8e4nv:
        return raw.to(tl.float16).to(DOT)
    else:
        return raw.to(DOT)


@triton.jit
def power_of_two(top):
    """Largest power of two not above ``top`` >= 0; 1 for 0."""
    power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power > 0, power, 1.0)


@triton.jit
def level(tile):
    """Rows of f32 brought to where 16 bits hold most of them: (tile, what to multiply rows by)."""
    power = power_of_two(tl.max(tl.abs(tile), axis=1))
    return tile / power[:, None] * HEADROOM, power / HEADROOM


@triton.jit
def fold_scales(q_tile, scales_ptr, d_idx, d_ok, stride):
    """q [BLOCK_P, BLOCK_D] f32 with the keys' scales."""
    scale_tile = tl.load(scales_ptr + d_idx * stride, mask=d_ok, other=0.0)  # [BLOCK_D]
    return q_tile.to(tl.float32) * scale_tile[None, :]


@triton.jit
def dot_in_parts(a_tile, b_tile, PARTS: tl.constexpr):
    """Product with f32 sums of f32 a and, as it is, b: a is taken as a sum of PARTS of b's dtype.

    Two f16 are a f32 but, now and then, for its last bit; three f16 or bf16 are all of it.
    """
    part = a_tile.to(b_tile.dtype)
    if PARTS == 1:
        return tl.dot(part, b_tile, input_precision="ieee")
    else:
        rest = a_tile - part.to(tl.float32)
        second = rest.to(b_tile.dtype)
        if PARTS == 3:
            third = (rest - second.to(tl.float32)).to(b_tile.dtype)
            small = tl.dot(second, b_tile, tl.dot(third, b_tile))
        else:
            small = tl.dot(second, b_tile)
        return tl.dot(part, b_tile, small)
