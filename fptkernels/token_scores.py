"""token_scores: exact column means of softmax attention, without the map.

    max[m]    = max_n q[m]·k[n]                                pass 1, by blocks of queries
    sum[m]    = sum_n exp2((q[m]·k[n] - max[m]) · c)           c = log2(e) / √D
    scores[n] = 1/N sum_m exp2((q[m]·k[n] - max[m]) · c) / sum[m]        pass 2, by blocks of keys

With a given log-sum-exp, pass 2 alone: exp2(q[m]·k[n] · c - lse[m] · log2(e)), one fused
multiply-add and one power of two a logit.  Ours stays in two numbers, because their f32
log-sum-exp would round logits of 100 by 4e-6.  Each program owns its results and sums in one order,
in f32: no atomics, bit-equal from run to run.  Tokens past the last whole block go in tiles of 16.
A NaN in q or k, or a logit of +Inf, makes all scores of its own head NaN, as softmax does, and
touches no other head; a logit of -Inf is a weight of 0.

Two passes win over one that holds all keys of a head on chip: given the log-sum-exp, one pass is
left either way, and a head that fills a multiprocessor leaves nothing to hide its powers of two.

The class token's row is one launch that reads k once: its logits wait in ``scores``.
"""

import torch
import triton
import triton.language as tl

from fptkernels import launch_table
from fptkernels.launch_table import CompileSpec, Tile
from fptkernels.primitives import LOG2E, finite_max, load_rows, products_with

# Rows of the tiles past the last whole block.
_TAIL = 16
# Column sums that a row keeps apart until the end: those that lie in one thread each.
_LANES = tl.constexpr(8)


@triton.jit
def _softmax_step(max_tile, sum_tile, products, c):
    """Running row maximum of products and sum of powers after one more block of keys."""
    new_max = tl.maximum(max_tile, tl.max(products, 1))
    shift = finite_max(new_max)
    weights = tl.exp2((products - shift[:, None]) * c)
    return new_max, sum_tile * tl.exp2((max_tile - shift) * c) + tl.sum(weights, 1)


@triton.jit
def _rows_kernel(
    q_ptr,
    k_ptr,
    max_ptr,
    inverse_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    heads,
    tokens,
    c,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Row maxima and inverse row sums [B, H, N] of one block of queries."""
    blocks = tl.cdiv(tokens, BLOCK_M)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of [B, H]
    image, head = row // heads, row % heads
    m_idx = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_idx = tl.arange(0, BLOCK_N).to(tl.int64)
    t_idx = tl.arange(0, TAIL).to(tl.int64)
    d_idx = tl.arange(0, STEP).to(tl.int64)
    m_ok, d_ok = m_idx < tokens, d_idx < WIDTH

    q_ptr += image * q_stride_b + head * q_stride_h
    q_ptrs = q_ptr + m_idx[:, None] * q_stride_n + d_idx[None, :] * q_stride_d
    q_tile = load_rows(q_ptrs, m_ok, d_ok, True, WIDTH != PADDED)  # [BLOCK_M, STEP]
    k_ptr += image * k_stride_b + head * k_stride_h
    k_ptrs = k_ptr + n_idx[:, None] * k_stride_n + d_idx[None, :] * k_stride_d
    k_step = tl.full((), BLOCK_N, tl.int64) * k_stride_n

    max_tile = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_tile = tl.zeros((BLOCK_M,), tl.float32)
    whole = tokens // BLOCK_N * BLOCK_N
    for _ in range(0, whole, BLOCK_N):
        products = products_with(
            *(q_tile, q_ptrs, k_ptrs, m_ok, n_idx >= 0, d_ok, q_stride_d, k_stride_d),
            *(BLOCK_M, BLOCK_N, False, WIDTH, PADDED, STEP, UPCAST),
        )
        max_tile, sum_tile = _softmax_step(max_tile, sum_tile, products, c)
        k_ptrs += k_step
    for start in tl.range(whole, tokens, TAIL, num_stages=1):
        n_ok = start + t_idx < tokens
        k_tail = k_ptr + (start + t_idx)[:, None] * k_stride_n + d_idx[None, :] * k_stride_d
        products = products_with(
            *(q_tile, q_ptrs, k_tail, m_ok, n_ok, d_ok, q_stride_d, k_stride_d),
            *(BLOCK_M, TAIL, True, WIDTH, PADDED, STEP, UPCAST),
        )
        products = tl.where(n_ok[None, :], products, float("-inf"))
        max_tile, sum_tile = _softmax_step(max_tile, sum_tile, products, c)
    tl.store(max_ptr + row * tokens + m_idx, max_tile, mask=m_ok)
    tl.store(inverse_ptr + row * tokens + m_idx, 1.0 / sum_tile, mask=m_ok)


@triton.jit
def _columns_step(
    sums_tile,
    products,
    shift_ptrs,
    inverse_ptrs,
    m_ok,
    c,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASK: tl.constexpr,
    OWN_ROWS: tl.constexpr,
):
    """Column sums [BLOCK_N, _LANES] after one more block of queries."""
    shift = tl.load(shift_ptrs, mask=m_ok, other=0.0)
    if OWN_ROWS:
        weights = tl.exp2((products - shift[None, :]) * c)
        weights *= tl.load(inverse_ptrs, mask=m_ok, other=0.0)[None, :]
    else:
        weights = tl.exp2(products * c - (shift * LOG2E)[None, :])
    if MASK:
        weights = tl.where(m_ok[None, :], weights, 0.0)
    # Column _LANES j + r of a product lies in the same thread for every j: no shuffles here.
    return sums_tile + tl.sum(tl.reshape(weights, (BLOCK_N, BLOCK_M // _LANES, _LANES)), 1)


@triton.jit
def _column_block(
    q_ptr,
    k_ptr,
    shift_ptr,
    inverse_ptr,
    scores_ptr,
    q_stride_n,
    q_stride_d,
    k_stride_n,
    k_stride_d,
    shift_stride_n,
    first,
    tokens,
    c,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores of BLOCK_N keys of one head, from ``first`` on."""
    n_idx = first + tl.arange(0, BLOCK_N)
    m_idx = tl.arange(0, BLOCK_M).to(tl.int64)
    t_idx = tl.arange(0, TAIL).to(tl.int64)
    d_idx = tl.arange(0, STEP).to(tl.int64)
    n_ok, d_ok = n_idx < tokens, d_idx < WIDTH

    k_ptrs = k_ptr + n_idx[:, None] * k_stride_n + d_idx[None, :] * k_stride_d
    k_tile = load_rows(k_ptrs, n_ok, d_ok, True, WIDTH != PADDED)  # [BLOCK_N, STEP]
    q_ptrs = q_ptr + m_idx[:, None] * q_stride_n + d_idx[None, :] * q_stride_d
    q_step = tl.full((), BLOCK_M, tl.int64) * q_stride_n

    sums_tile = tl.zeros((BLOCK_N, _LANES), tl.float32)
    whole = tokens // BLOCK_M * BLOCK_M
    for start in range(0, whole, BLOCK_M):
        m_ok = m_idx >= 0
        products = products_with(
            *(k_tile, k_ptrs, q_ptrs, n_ok, m_ok, d_ok, k_stride_d, q_stride_d),
            *(BLOCK_N, BLOCK_M, False, WIDTH, PADDED, STEP, UPCAST),
        )
        shift_ptrs = shift_ptr + (start + m_idx) * shift_stride_n
        sums_tile = _columns_step(
            *(sums_tile, products, shift_ptrs, inverse_ptr + start + m_idx, m_ok, c),
            *(BLOCK_N, BLOCK_M, False, OWN_ROWS),
        )
        q_ptrs += q_step
    for start in tl.range(whole, tokens, TAIL, num_stages=1):
        m_ok = start + t_idx < tokens
        q_tail = q_ptr + (start + t_idx)[:, None] * q_stride_n + d_idx[None, :] * q_stride_d
        products = products_with(
            *(k_tile, k_ptrs, q_tail, n_ok, m_ok, d_ok, k_stride_d, q_stride_d),
            *(BLOCK_N, TAIL, True, WIDTH, PADDED, STEP, UPCAST),
        )
        shift_ptrs = shift_ptr + (start + t_idx) * shift_stride_n
        sums_tile = _columns_step(
            *(sums_tile, products, shift_ptrs, inverse_ptr + start + t_idx, m_ok, c),
            *(BLOCK_N, TAIL, True, OWN_ROWS),
        )
    tl.store(scores_ptr + n_idx, tl.sum(sums_tile, 1) / tokens, mask=n_ok)


@triton.jit
def _columns_kernel(
    q_ptr,
    k_ptr,
    shift_ptr,
    inverse_ptr,
    scores_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    shift_stride_b,
    shift_stride_h,
    shift_stride_n,
    heads,
    tokens,
    c,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    OWN_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores [B, H, N] of one block of keys."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of [B, H]
    image, head = row // heads, row % heads
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N
    q_ptr += image * q_stride_b + head * q_stride_h
    k_ptr += image * k_stride_b + head * k_stride_h
    shift_ptr += image * shift_stride_b + head * shift_stride_h
    inverse_ptr += row * tokens
    scores_ptr += row * tokens
    if BLOCK_N > TAIL and tokens - first <= TAIL:
        _column_block(
            *(q_ptr, k_ptr, shift_ptr, inverse_ptr, scores_ptr, q_stride_n, q_stride_d),
            *(k_stride_n, k_stride_d, shift_stride_n, first, tokens, c),
            *(TAIL, BLOCK_M, TAIL, WIDTH, PADDED, STEP, OWN_ROWS, UPCAST),
        )
    else:
        _column_block(
            *(q_ptr, k_ptr, shift_ptr, inverse_ptr, scores_ptr, q_stride_n, q_stride_d),
            *(k_stride_n, k_stride_d, shift_stride_n, first, tokens, c),
            *(BLOCK_N, BLOCK_M, TAIL, WIDTH, PADDED, STEP, OWN_ROWS, UPCAST),
        )


@triton.jit
def _class_token_kernel(
    q_ptr,
    k_ptr,
    scores_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    heads,
    tokens,
    c,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """First row of the map [B, H, N] of one head."""
    row = tl.program_id(0).to(tl.int64)  # of [B, H]
    image, head = row // heads, row % heads
    n_idx = tl.arange(0, BLOCK_N).to(tl.int64)
    d_idx = tl.arange(0, PADDED).to(tl.int64)
    d_ok = d_idx < WIDTH
    q_ptrs = q_ptr + image * q_stride_b + head * q_stride_h + d_idx * q_stride_d
    # Products of f16 and bf16 are exact in f32; of f32, one row's in f64 cost nothing to speak of.
    IS_F32: tl.constexpr = k_ptr.dtype.element_ty == tl.float32
    WIDE: tl.constexpr = tl.float64 if IS_F32 else tl.float32
    q_tile = tl.load(q_ptrs, mask=d_ok, other=0.0).to(WIDE)  # [PADDED]
    k_ptr += image * k_stride_b + head * k_stride_h
    scores_ptr += row * tokens

    # Each of BLOCK_N lanes sums the tokens that it sees.
    max_tile = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    sum_tile = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        n_ok = start + n_idx < tokens
        k_ptrs = k_ptr + (start + n_idx)[:, None] * k_stride_n + d_idx[None, :] * k_stride_d
        k_tile = load_rows(k_ptrs, n_ok, d_ok, True, WIDTH != PADDED)  # [BLOCK_N, PADDED]
        products = tl.sum(k_tile.to(WIDE) * q_tile[None, :], 1).to(tl.float32)
        tl.store(scores_ptr + start + n_idx, products, mask=n_ok)
        products = tl.where(n_ok, products, float("-inf"))
        new_max = tl.maximum(max_tile, products)
        shift = finite_max(new_max)
        sum_tile = sum_tile * tl.exp2((max_tile - shift) * c) + tl.exp2((products - shift) * c)
        max_tile = new_max
    shift = finite_max(tl.max(max_tile, 0))
    total = tl.sum(sum_tile * tl.exp2((max_tile - shift) * c), 0)
    tl.debug_barrier()  # what other threads stored is read below
    for start in range(0, tokens, BLOCK_N):
        n_ok = start + n_idx < tokens
        products = tl.load(scores_ptr + start + n_idx, mask=n_ok)
        weights = tl.exp2((products - shift) * c) / total
        tl.store(scores_ptr + start + n_idx, weights, mask=n_ok)


def token_scores(
    q: torch.Tensor, k: torch.Tensor, importance: str, lse: torch.Tensor | None
) -> torch.Tensor:
    """Scores [B, H, N] f32 of q, k [B, H, N, D]; the first pass only where lse is not given."""
    scores = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    if scores.numel() == 0:
        return scores
    with torch.cuda.device_of(q):
        if importance == "class_token":
            _launch_class_token(q, k, scores)
            return scores
        shift, inverse = (lse, lse) if lse is not None else _row_statistics(q, k)
        sizes = _tile("token_scores_columns", q)
        grid = (q.shape[0] * q.shape[1] * triton.cdiv(k.shape[2], sizes.block_n),)
        _columns_kernel[grid](
            *(q, k, shift, inverse, scores, *q.stride(), *k.stride(), *shift.stride()),
            *(q.shape[1], q.shape[2], _log2_scale(q)),
            OWN_ROWS=lse is None,
            **_constants(q.shape[3], q.dtype, sizes, launch_table.is_interpreted()),
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
    return scores


def _row_statistics(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maxima and inverse row sums, [B, H, N] f32 each."""
    row_max = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    inverse = torch.empty_like(row_max)
    sizes = _tile("token_scores_rows", q)
    grid = (q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], sizes.block_m),)
    _rows_kernel[grid](
        *(q, k, row_max, inverse, *q.stride(), *k.stride()),
        *(q.shape[1], q.shape[2], _log2_scale(q)),
        **_constants(q.shape[3], q.dtype, sizes, launch_table.is_interpreted()),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
    return row_max, inverse


def _launch_class_token(q: torch.Tensor, k: torch.Tensor, scores: torch.Tensor) -> None:
    sizes = _tile("token_scores_class_token", q)
    q_strides = (q.stride(0), q.stride(1), q.stride(3))
    _class_token_kernel[(q.shape[0] * q.shape[1],)](
        *(q, k, scores, *q_strides, *k.stride(), q.shape[1], q.shape[2], _log2_scale(q)),
        WIDTH=q.shape[3],
        PADDED=launch_table.pad_width(q.shape[3]),
        BLOCK_N=sizes.block_n,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )


def _log2_scale(q: torch.Tensor) -> float:
    return q.shape[3] ** -0.5 * LOG2E.value


def _tile(kernel: str, q: torch.Tensor) -> Tile:
    return launch_table.tile(kernel, q.dtype, launch_table.pad_width(q.shape[3]), q.device)


def _constants(width: int, dtype: torch.dtype, sizes: Tile, upcast: bool) -> dict[str, int | bool]:
    return {
        **launch_table.width_constants(width, dtype),
        "BLOCK_M": sizes.block_m,
        "BLOCK_N": sizes.block_n,
        "TAIL": _TAIL,
        "UPCAST": upcast,
    }


def compile_specs() -> list[CompileSpec]:
    """Every row of the launch table, on tensors whose head width is the padded one.

    Of the columns, also the form with a given log-sum-exp.
    """
    return [
        _spec(key, sizes, with_lse)
        for key, sizes in launch_table.TABLE.items()
        if key[0].startswith("token_scores_")
        for with_lse in ((False, True) if key[0] == "token_scores_columns" else (False,))
    ]


def _spec(key: launch_table.Key, sizes: Tile, with_lse: bool) -> CompileSpec:
    name, dtype, padded, architecture = key
    short = launch_table.SHORT_NAMES[dtype]
    pointers = {"q_ptr": f"*{short}", "k_ptr": f"*{short}"}
    others = {"heads": "i32", "tokens": "i32", "c": "fp32"}
    strides = [f"{x}_stride_{axis}" for x in "qk" for axis in "bhn"]
    constexprs = {"q_stride_d": 1, "k_stride_d": 1}
    if name == "token_scores_class_token":
        kernel = _class_token_kernel
        pointers["scores_ptr"] = "*fp32"
        strides.remove("q_stride_n")
        constexprs |= {"WIDTH": padded, "PADDED": padded, "BLOCK_N": sizes.block_n}
    else:
        kernel = _rows_kernel
        pointers |= dict.fromkeys(["max_ptr", "inverse_ptr"], "*fp32")
        constexprs |= _constants(padded, dtype, sizes, False)
    if name == "token_scores_columns":
        kernel = _columns_kernel
        del pointers["max_ptr"]
        pointers |= dict.fromkeys(["shift_ptr", "scores_ptr"], "*fp32")
        others |= {"shift_stride_b": "i32", "shift_stride_h": "i32"}
        constexprs |= {"shift_stride_n": 1, "OWN_ROWS": not with_lse}
    return CompileSpec(
        name=f"{name} {short} D{padded}" + " lse" * with_lse,
        kernel=kernel,
        signature=pointers | dict.fromkeys(strides, "i32") | others,
        constexprs=constexprs,
        architecture=architecture,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        aligned=[*pointers, *strides],
    )
