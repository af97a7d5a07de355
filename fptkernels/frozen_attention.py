"""frozen_attention: softmax attention of a frozen layer and its row log-sum-exp, without the map.

    max[m] = max_n q[m]·k[n]                          keys and values stream past a block of queries
    sum[m] = sum_n exp2((q[m]·k[n] - max[m]) · c)     c = log2(e) / √D
    out[m] = sum_n exp2((q[m]·k[n] - max[m]) · c) v[n] / sum[m]
    lse[m] = max[m] / √D + log(sum[m])

Maxima stay those of the bare products, so that a logit costs one fused multiply-add and one power
of two.  Sums are in f32, in one order, without atomics: bit-equal from run to run.  The weights
are rounded to the values' dtype for their product, as flash attention does.  Tokens past the
last whole block, of queries and of keys, go in tiles of 16: the 1025th costs a sixteenth of a
tile, and the main loop masks no row.

A NaN in q or k, or a logit of +Inf, makes its own rows of out and lse NaN and touches no others;
a logit of -Inf is a weight of 0; a row without any other is NaN, and its lse -Inf.  A NaN in v
makes its column of out NaN.  So does the plain expression, but for the lse of a logit of +Inf.
"""

import torch
import triton
import triton.language as tl

from fptkernels import launch_table
from fptkernels.launch_table import CompileSpec, Tile
from fptkernels.primitives import LOG2E, finite_max, load_rows, products_with

# Rows of the tiles past the last whole block.
_TAIL = 16


@triton.jit
def _step(
    acc_tile,
    max_tile,
    sum_tile,
    q_tile,
    q_ptrs,
    k_ptrs,
    v_ptrs,
    m_ok,
    n_ok,
    d_idx,
    q_stride_d,
    k_stride_d,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Running output, row maxima and row sums after one more block of keys and values."""
    products = products_with(
        *(q_tile, q_ptrs, k_ptrs, m_ok, n_ok, tl.arange(0, STEP) < WIDTH, q_stride_d, k_stride_d),
        *(BLOCK_M, BLOCK_N, MASK, WIDTH, PADDED, STEP, UPCAST),
    )
    if MASK:
        products = tl.where(n_ok[None, :], products, float("-inf"))
    new_max = tl.maximum(max_tile, tl.max(products, 1))
    shift = finite_max(new_max)
    c = scale * LOG2E
    weights = tl.exp2(products * c - (shift * c)[:, None])  # [BLOCK_M, BLOCK_N]
    rescale = tl.exp2((max_tile - shift) * c)
    v_tile = load_rows(v_ptrs, n_ok, d_idx < WIDTH, MASK, WIDTH != PADDED)  # [BLOCK_N, PADDED]
    narrow = weights.to(v_tile.dtype)
    if UPCAST:
        narrow, v_tile = narrow.to(tl.float32), v_tile.to(tl.float32)
    acc_tile = tl.dot(narrow, v_tile, acc_tile * rescale[:, None], input_precision="ieee")
    return acc_tile, new_max, sum_tile * rescale + tl.sum(weights, 1)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_stride_n,
    q_stride_d,
    k_stride_n,
    k_stride_d,
    v_stride_n,
    v_stride_d,
    out_stride_n,
    first,
    tokens,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Output and log-sum-exp of BLOCK_M queries of one head, from ``first`` on."""
    m_idx = first + tl.arange(0, BLOCK_M)
    n_idx = tl.arange(0, BLOCK_N).to(tl.int64)
    d_idx = tl.arange(0, PADDED)
    step_idx = tl.arange(0, STEP).to(tl.int64)
    m_ok = m_idx < tokens

    q_ptrs = q_ptr + m_idx[:, None] * q_stride_n + step_idx[None, :] * q_stride_d
    q_tile = load_rows(q_ptrs, m_ok, step_idx < WIDTH, True, WIDTH != PADDED)  # [BLOCK_M, STEP]
    k_ptrs = k_ptr + n_idx[:, None] * k_stride_n + step_idx[None, :] * k_stride_d
    v_ptrs = v_ptr + n_idx[:, None] * v_stride_n + d_idx.to(tl.int64)[None, :] * v_stride_d
    k_step = tl.full((), BLOCK_N, tl.int64) * k_stride_n
    v_step = tl.full((), BLOCK_N, tl.int64) * v_stride_n

    max_tile = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_tile = tl.zeros((BLOCK_M,), tl.float32)
    acc_tile = tl.zeros((BLOCK_M, PADDED), tl.float32)
    whole = tokens // BLOCK_N * BLOCK_N
    for _ in range(0, whole, BLOCK_N):
        acc_tile, max_tile, sum_tile = _step(
            *(acc_tile, max_tile, sum_tile, q_tile, q_ptrs, k_ptrs, v_ptrs, m_ok, n_idx >= 0),
            *(d_idx, q_stride_d, k_stride_d, scale),
            *(BLOCK_M, BLOCK_N, False, WIDTH, PADDED, STEP, UPCAST),
        )
        k_ptrs += k_step
        v_ptrs += v_step
    for start in tl.range(whole, tokens, TAIL, num_stages=1):
        t_idx = start + tl.arange(0, TAIL).to(tl.int64)
        k_tail = k_ptr + t_idx[:, None] * k_stride_n + step_idx[None, :] * k_stride_d
        v_tail = v_ptr + t_idx[:, None] * v_stride_n + d_idx.to(tl.int64)[None, :] * v_stride_d
        acc_tile, max_tile, sum_tile = _step(
            *(acc_tile, max_tile, sum_tile, q_tile, q_ptrs, k_tail, v_tail, m_ok, t_idx < tokens),
            *(d_idx, q_stride_d, k_stride_d, scale),
            *(BLOCK_M, TAIL, True, WIDTH, PADDED, STEP, UPCAST),
        )
    out_tile = acc_tile * (1.0 / sum_tile)[:, None]
    out_ptrs = out_ptr + m_idx[:, None] * out_stride_n + d_idx[None, :]
    out_ok = m_ok[:, None] & (d_idx < WIDTH)[None, :]
    tl.store(out_ptrs, out_tile.to(out_ptr.dtype.element_ty), mask=out_ok)
    tl.store(lse_ptr + m_idx, max_tile * scale + tl.log(sum_tile), mask=m_ok)


@triton.jit
def _attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    v_stride_d,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    heads,
    tokens,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One block of queries of one head; a short last one in a tile of its size."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of [B, H]
    image, head = row // heads, row % heads
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M
    q_ptr += image * q_stride_b + head * q_stride_h
    k_ptr += image * k_stride_b + head * k_stride_h
    v_ptr += image * v_stride_b + head * v_stride_h
    out_ptr += image * out_stride_b + head * out_stride_h
    lse_ptr += row * tokens
    if BLOCK_M > TAIL and tokens - first <= TAIL:
        _attend(
            *(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stride_n, q_stride_d, k_stride_n),
            *(k_stride_d, v_stride_n, v_stride_d, out_stride_n, first, tokens, scale),
            *(TAIL, BLOCK_N, TAIL, WIDTH, PADDED, STEP, UPCAST),
        )
    else:
        _attend(
            *(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_stride_n, q_stride_d, k_stride_n),
            *(k_stride_d, v_stride_n, v_stride_d, out_stride_n, first, tokens, scale),
            *(BLOCK_M, BLOCK_N, TAIL, WIDTH, PADDED, STEP, UPCAST),
        )


def frozen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [B, H, N, D] of q's dtype, [B, N, H, D] in memory, and lse [B, H, N] f32."""
    batch, heads, tokens, width = q.shape
    out = q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    padded = launch_table.pad_width(width)
    with torch.cuda.device_of(q):
        sizes = launch_table.tile("frozen_attention", q.dtype, padded, q.device)
        grid = (batch * heads * triton.cdiv(tokens, sizes.block_m),)
        _attention_kernel[grid](
            *(q, k, v, out, lse, *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3]),
            *(heads, tokens, width**-0.5),
            **_constants(width, q.dtype, sizes, launch_table.is_interpreted()),
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
    return out, lse


def _constants(width: int, dtype: torch.dtype, sizes: Tile, upcast: bool) -> dict[str, int | bool]:
    return {
        **launch_table.width_constants(width, dtype),
        "BLOCK_M": sizes.block_m,
        "BLOCK_N": sizes.block_n,
        "TAIL": _TAIL,
        "UPCAST": upcast,
    }


def compile_specs() -> list[CompileSpec]:
    """Every row of the launch table, on tensors whose head width is the padded one."""
    specs = []
    for (name, dtype, padded, architecture), sizes in launch_table.TABLE.items():
        if name != "frozen_attention":
            continue
        short = launch_table.SHORT_NAMES[dtype]
        pointers = {f"{x}_ptr": f"*{short}" for x in ("q", "k", "v", "out")} | {"lse_ptr": "*fp32"}
        strides = [f"{x}_stride_{axis}" for x in ("q", "k", "v", "out") for axis in "bhn"]
        specs.append(
            CompileSpec(
                name=f"{name} {short} D{padded}",
                kernel=_attention_kernel,
                signature=pointers
                | dict.fromkeys(strides, "i32")
                | {"heads": "i32", "tokens": "i32", "scale": "fp32"},
                constexprs={
                    **{f"{x}_stride_d": 1 for x in "qkv"},
                    **_constants(padded, dtype, sizes, False),
                },
                architecture=architecture,
                num_warps=sizes.num_warps,
                num_stages=sizes.num_stages,
                aligned=[*pointers, *strides],
            )
        )
    return specs
