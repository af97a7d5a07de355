"""``x8 = round(x * largest / max |x|)`` and ``scale = max |x| / largest``, of K by channel, of V
by token, where ``largest`` is 127 (int8), 448 (e4m3) or 57344 (e5m2).

One program per (image, layer, K or V, head).  Keys are read twice, for their maxima over the
tokens and then to be scaled, the second time from a cache: one head is 26 KB in FPT+ on ViT-B.
Values are read once.  So 2 bytes are read and 1 is written for each value of f16 features:
91 MB for 16 images of FPT+, 21 µs at 4.3 TB/s.

Bit-equal to f32 arithmetic in torch: maxima are taken of the bits, where NaN is the highest;
divisions are exact to the last bit; no product is fused with a sum.  Rounding to nearest even is
the addition of a number so large that the bits below the last one wanted fall away.  No clamping:
x * (largest / max |x|) is above ``largest`` by two roundings of f32 at most, which this drops.
fp8 is made of bits, since before sm_89 it is no type.

A maximum that is not finite gives zeros of scale NaN; one whose scale is not a normal number (0)
gives zeros of scale 0.  None of this has been measured on a GPU yet.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fptkernels import launch_table
from fptkernels.launch_table import SHORT_NAMES, TABLE, CompileSpec, Key, Tile, pad_width

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
# Bits of the mantissa; 0 stands for int8.
_MANTISSA = {torch.int8: 0, torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}

_INFINITY = tl.constexpr(0x7F800000)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_ROUND_TO_1 = tl.constexpr(1.5 * 2.0**23)  # f32 of this size are whole numbers


@triton.jit
def _load(head_ptr, k_idx, d_idx, stride_k, stride_d, ok):
    """f32 [BLOCK_K, BLOCK_D]; what lies outside is 0, and no maximum."""
    ptrs = head_ptr + k_idx[:, None] * stride_k + d_idx[None, :] * stride_d
    return tl.load(ptrs, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _magnitude(tile):
    """Bits of |tile| as i32: of the same order, infinity and NaN last."""
    return tile.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scales(top_bits, LARGEST: tl.constexpr):
    """Scale, its inverse, and where both are plain numbers, of the maxima with these bits."""
    top = top_bits.to(tl.float32, bitcast=True)
    largest = tl.full(top.shape, LARGEST, tl.float32)
    scale = tl.div_rn(top, largest)
    is_finite = top_bits < _INFINITY
    is_plain = is_finite & (scale >= _SMALLEST_NORMAL)
    inverse = tl.div_rn(largest, tl.where(is_plain, top, 1.0))
    scale = tl.where(is_plain, scale, 0.0)
    return tl.where(is_finite, scale, float("nan")), inverse, is_plain


@triton.jit
def _round(tile, MANTISSA: tl.constexpr):
    """Nearest 8-bit numbers, ties to even, of f32 within their range: i8, or the bits of fp8."""
    if MANTISSA == 0:
        # The whole number stands in the low bits of the sum.
        return (tile + _ROUND_TO_1).to(tl.int32, bitcast=True).to(tl.int8)
    else:
        sign = (tile.to(tl.int32, bitcast=True) >> 24) & 0x80
        size = tl.abs(tile)
        power = (size.to(tl.int32, bitcast=True) & _INFINITY).to(tl.float32, bitcast=True)
        # e4m3 is normal from 2^-6, e5m2 from 2^-14; an f16 of 1/256 of an e4m3 has the same fields.
        smallest: tl.constexpr = 2.0**-6 if MANTISSA == 3 else 2.0**-14
        shift: tl.constexpr = 2.0**-8 if MANTISSA == 3 else 1.0
        step: tl.constexpr = 1.5 * 2.0 ** (23 - MANTISSA)
        large = tl.maximum(power, smallest) * step
        rounded = (size + large) - large
        half = (rounded * shift).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        return (sign | (half >> (10 - MANTISSA))).to(tl.uint8)


@triton.jit(do_not_specialize=["heads", "kept"])
def quantise_kv_kernel(
    kv_ptr, kv8_ptr, k_scales_ptr, v_scales_ptr,
    stride_m, stride_l, stride_s, stride_h, stride_k, stride_d,
    layers, heads, kept,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    LARGEST: tl.constexpr, MANTISSA: tl.constexpr,
):  # fmt: skip
    """Program ((m * L + l) * 2 + s) * H + h has the keys (s = 0) or values (s = 1) of one head."""
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    part = program // heads % 2
    record = program // (2 * heads)  # m * L + l
    kv_ptr += record // layers * stride_m + record % layers * stride_l
    kv_ptr += part * stride_s + head * stride_h
    kv8_ptr += program * kept * D
    block_idx = tl.arange(0, BLOCK_K).to(tl.int64)
    d_idx = tl.arange(0, BLOCK_D).to(tl.int64)
    d_ok = d_idx < D
    if part == 0:
        top_tile = tl.zeros((BLOCK_K, BLOCK_D), tl.int32)
        for start in range(0, kept, BLOCK_K):
            k_idx = start + block_idx
            ok = (k_idx < kept)[:, None] & d_ok[None, :]
            tile = _load(kv_ptr, k_idx, d_idx, stride_k, stride_d, ok)  # [BLOCK_K, BLOCK_D]
            top_tile = tl.maximum(top_tile, _magnitude(tile))
        scale, inverse, is_plain = _scales(tl.max(top_tile, axis=0), LARGEST)  # [BLOCK_D]
        tl.store(k_scales_ptr + (record * heads + head) * D + d_idx, scale, mask=d_ok)
        for start in range(0, kept, BLOCK_K):
            k_idx = start + block_idx
            ok = (k_idx < kept)[:, None] & d_ok[None, :]
            tile = _load(kv_ptr, k_idx, d_idx, stride_k, stride_d, ok)  # [BLOCK_K, BLOCK_D]
            scaled = tl.where(is_plain[None, :], tile * inverse[None, :], 0.0)
            out_idx = k_idx[:, None] * D + d_idx[None, :]
            tl.store(kv8_ptr + out_idx, _round(scaled, MANTISSA), mask=ok)
    else:
        for start in range(0, kept, BLOCK_K):
            k_idx = start + block_idx
            ok = (k_idx < kept)[:, None] & d_ok[None, :]
            tile = _load(kv_ptr, k_idx, d_idx, stride_k, stride_d, ok)  # [BLOCK_K, BLOCK_D]
            scale, inverse, is_plain = _scales(tl.max(_magnitude(tile), axis=1), LARGEST)
            scaled = tl.where(is_plain[:, None], tile * inverse[:, None], 0.0)
            out_idx = k_idx[:, None] * D + d_idx[None, :]
            tl.store(kv8_ptr + out_idx, _round(scaled, MANTISSA), mask=ok)
            scale_idx = (record * heads + head) * kept + k_idx
            tl.store(v_scales_ptr + scale_idx, scale, mask=k_idx < kept)


def quantise_kv(kv: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """kv [M, L, 2, H, K, D] -> kv8 of ``dtype``, k_scales [M, L, H, D], v_scales [M, L, H, K]."""
    images, layers, _, heads, kept, width = kv.shape
    kv8 = torch.empty(kv.shape, dtype=dtype, device=kv.device)
    k_scales = torch.empty((images, layers, heads, width), device=kv.device)
    v_scales = torch.empty((images, layers, heads, kept), device=kv.device)
    programs = images * layers * 2 * heads
    if programs == 0:
        return kv8, k_scales, v_scales
    tile = launch_table.tile("quantise_kv", kv.dtype, pad_width(width), kv.device)
    with torch.cuda.device_of(kv):
        quantise_kv_kernel[(programs,)](
            kv,
            kv8 if dtype == torch.int8 else kv8.view(torch.uint8),
            k_scales,
            v_scales,
            *kv.stride(),
            layers,
            heads,
            kept,
            **_constants(width, dtype, tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=False,
        )
    return kv8, k_scales, v_scales


def _constants(width: int, dtype: torch.dtype, tile: Tile) -> dict[str, object]:
    """The kernel's constexprs, at run time and for the compile report."""
    return {
        "D": width,
        "BLOCK_D": pad_width(width),
        "BLOCK_K": tile.block_n,
        "LARGEST": _LARGEST[dtype],
        "MANTISSA": _MANTISSA[dtype],
    }


def compile_specs() -> list[CompileSpec]:
    """One per row of the table and 8-bit dtype."""
    rows = [(key, tile) for key, tile in TABLE.items() if key[0] == "quantise_kv"]
    return [_compile_spec(key, tile, dtype) for key, tile in rows for dtype in _LARGEST]


def _compile_spec(key: Key, tile: Tile, dtype: torch.dtype) -> CompileSpec:
    _, source, padded, architecture = key
    target = "i8" if dtype == torch.int8 else "u8"
    constexprs = {"stride_d": 1, **_constants(padded, dtype, tile)}
    pointers = {
        "kv_ptr": f"*{SHORT_NAMES[source]}",
        "kv8_ptr": f"*{target}",
        "k_scales_ptr": "*fp32",
        "v_scales_ptr": "*fp32",
    }
    names = [name for name in quantise_kv_kernel.arg_names if name not in constexprs]
    strides = [name for name in names if name.startswith("stride")]
    return CompileSpec(
        name=f"quantise_kv {SHORT_NAMES[source]}->{str(dtype).removeprefix('torch.')} D{padded}",
        kernel=quantise_kv_kernel,
        signature={n: pointers.get(n, "i64" if n in strides else "i32") for n in names},
        constexprs=constexprs,
        architecture=architecture,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        aligned=(*pointers, *strides),
    )
