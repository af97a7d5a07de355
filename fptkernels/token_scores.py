"""token_scores: exact column means of softmax attention, without the map.

    max[m]    = max_n q[m]·k[n] / √D                              pass 1, by blocks of queries
    sum[m]    = sum_n exp(q[m]·k[n] / √D - max[m])
    scores[n] = 1/M sum_m exp(q[m]·k[n] / √D - max[m]) / sum[m]   pass 2, by blocks of keys

M is N, or 1 for the class token's row.  A given log-sum-exp takes the place of max, with a sum
of 1; ours stays in two numbers, because their f32 log-sum-exp would round logits of 100 by
4e-6.  Each program owns its results and sums in one order, in f32: no atomics, bit-equal from
run to run.  A NaN in q or k, or a logit of +Inf, makes all scores of its own head NaN, as
softmax does, and touches no other head; a logit of -Inf is a weight of 0.
"""

import torch
import triton
import triton.language as tl

from fptkernels import launch_table
from fptkernels.launch_table import CompileSpec, Tile
from fptkernels.primitives import dot, dot_in_steps, exp_of, finite_max, load_rows

# Columns of q and k that one f32 product takes at a time.
_F32_STEP = 16


@triton.jit
def _logits(
    own_tile,
    own_ptrs,
    other_ptrs,
    own_ok,
    other_ok,
    d_ok,
    own_stride_d,
    other_stride_d,
    scale,
    BLOCK_OWN: tl.constexpr,
    BLOCK_OTHER: tl.constexpr,
    MASK_ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Logits [BLOCK_OWN, BLOCK_OTHER] of the rows that the program owns with others."""
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
    return products * scale


@triton.jit
def _softmax_step(max_tile, sum_tile, logits):
    """Running row maximum and sum of exponentials after one more block of keys."""
    new_max = tl.maximum(max_tile, tl.max(logits, 1))
    shift = finite_max(new_max)
    weights = exp_of(logits - shift[:, None])
    return new_max, sum_tile * exp_of(max_tile - shift) + tl.sum(weights, 1)


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
    queries,
    tokens,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Row maxima and inverse row sums [B, H, M] of one block of queries."""
    blocks = tl.cdiv(queries, BLOCK_M)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of [B, H]
    image, head = row // heads, row % heads
    m_idx = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_idx = tl.arange(0, BLOCK_N).to(tl.int64)
    d_idx = tl.arange(0, STEP).to(tl.int64)
    m_ok, d_ok = m_idx < queries, d_idx < WIDTH

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
        logits = _logits(
            *(q_tile, q_ptrs, k_ptrs, m_ok, n_idx >= 0, d_ok, q_stride_d, k_stride_d, scale),
            *(BLOCK_M, BLOCK_N, False, WIDTH, PADDED, STEP, UPCAST),
        )
        max_tile, sum_tile = _softmax_step(max_tile, sum_tile, logits)
        k_ptrs += k_step
    if whole < tokens:
        n_ok = n_idx < tokens - whole
        logits = _logits(
            *(q_tile, q_ptrs, k_ptrs, m_ok, n_ok, d_ok, q_stride_d, k_stride_d, scale),
            *(BLOCK_M, BLOCK_N, True, WIDTH, PADDED, STEP, UPCAST),
        )
        logits = tl.where(n_ok[None, :], logits, float("-inf"))
        max_tile, sum_tile = _softmax_step(max_tile, sum_tile, logits)
    tl.store(max_ptr + row * queries + m_idx, max_tile, mask=m_ok)
    tl.store(inverse_ptr + row * queries + m_idx, 1.0 / sum_tile, mask=m_ok)


@triton.jit
def _columns_step(
    sum_tile, logits, max_ptrs, inverse_ptrs, m_ok, MASK: tl.constexpr, HAS_INVERSE: tl.constexpr
):
    """Running column sums after one more block of queries."""
    max_tile = tl.load(max_ptrs, mask=m_ok, other=0.0)
    weights = exp_of(logits - max_tile[None, :])
    if HAS_INVERSE:
        weights *= tl.load(inverse_ptrs, mask=m_ok, other=0.0)[None, :]
    if MASK:
        weights = tl.where(m_ok[None, :], weights, 0.0)
    return sum_tile + tl.sum(weights, 1)


@triton.jit
def _columns_kernel(
    q_ptr,
    k_ptr,
    max_ptr,
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
    max_stride_b,
    max_stride_h,
    max_stride_n,
    heads,
    queries,
    tokens,
    scale,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_INVERSE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Scores [B, H, N] of one block of keys."""
    blocks = tl.cdiv(tokens, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)  # of [B, H]
    image, head = row // heads, row % heads
    n_idx = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_idx = tl.arange(0, BLOCK_M).to(tl.int64)
    d_idx = tl.arange(0, STEP).to(tl.int64)
    n_ok, d_ok = n_idx < tokens, d_idx < WIDTH

    k_ptr += image * k_stride_b + head * k_stride_h
    k_ptrs = k_ptr + n_idx[:, None] * k_stride_n + d_idx[None, :] * k_stride_d
    k_tile = load_rows(k_ptrs, n_ok, d_ok, True, WIDTH != PADDED)  # [BLOCK_N, STEP]
    q_ptr += image * q_stride_b + head * q_stride_h
    q_ptrs = q_ptr + m_idx[:, None] * q_stride_n + d_idx[None, :] * q_stride_d
    q_step = tl.full((), BLOCK_M, tl.int64) * q_stride_n
    max_idx = image * max_stride_b + head * max_stride_h + m_idx * max_stride_n
    max_step = tl.full((), BLOCK_M, tl.int64) * max_stride_n

    sum_tile = tl.zeros((BLOCK_N,), tl.float32)
    whole = queries // BLOCK_M * BLOCK_M
    for _ in range(0, whole, BLOCK_M):
        m_ok = m_idx >= 0
        logits = _logits(
            *(k_tile, k_ptrs, q_ptrs, n_ok, m_ok, d_ok, k_stride_d, q_stride_d, scale),
            *(BLOCK_N, BLOCK_M, False, WIDTH, PADDED, STEP, UPCAST),
        )
        max_ptrs, inverse_ptrs = max_ptr + max_idx, inverse_ptr + max_idx
        sum_tile = _columns_step(sum_tile, logits, max_ptrs, inverse_ptrs, m_ok, False, HAS_INVERSE)
        q_ptrs += q_step
        max_idx += max_step
    if whole < queries:
        m_ok = m_idx < queries - whole
        logits = _logits(
            *(k_tile, k_ptrs, q_ptrs, n_ok, m_ok, d_ok, k_stride_d, q_stride_d, scale),
            *(BLOCK_N, BLOCK_M, True, WIDTH, PADDED, STEP, UPCAST),
        )
        max_ptrs, inverse_ptrs = max_ptr + max_idx, inverse_ptr + max_idx
        sum_tile = _columns_step(sum_tile, logits, max_ptrs, inverse_ptrs, m_ok, True, HAS_INVERSE)
    tl.store(scores_ptr + row * tokens + n_idx, sum_tile / queries, mask=n_ok)


def token_scores(
    q: torch.Tensor, k: torch.Tensor, importance: str, lse: torch.Tensor | None
) -> torch.Tensor:
    """Scores [B, H, N] f32 of q, k [B, H, N, D]; the first pass only where lse is not given.

    ``"class_token"`` is the same with the first query alone; it computes its own row's sums.
    """
    if importance == "class_token":
        q, lse = q[:, :, :1], None
    scores = torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)
    if scores.numel() == 0:
        return scores
    with torch.cuda.device_of(q):
        row_max, inverse = (lse, lse) if lse is not None else _row_statistics(q, k)
        sizes = _tile("token_scores_columns", q)
        grid = (q.shape[0] * q.shape[1] * triton.cdiv(k.shape[2], sizes.block_n),)
        _columns_kernel[grid](
            *(q, k, row_max, inverse, scores, *q.stride(), *k.stride(), *row_max.stride()),
            *(q.shape[1], q.shape[2], k.shape[2], q.shape[3] ** -0.5),
            HAS_INVERSE=lse is None,
            **_constants(q.shape[3], q.dtype, sizes, launch_table.is_interpreted()),
            num_warps=sizes.num_warps,
            num_stages=sizes.num_stages,
        )
    return scores


def _row_statistics(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Row maxima and inverse row sums, [B, H, M] f32 each."""
    row_max = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    inverse = torch.empty_like(row_max)
    sizes = _tile("token_scores_rows", q)
    grid = (q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], sizes.block_m),)
    _rows_kernel[grid](
        *(q, k, row_max, inverse, *q.stride(), *k.stride()),
        *(q.shape[1], q.shape[2], k.shape[2], q.shape[3] ** -0.5),
        **_constants(q.shape[3], q.dtype, sizes, launch_table.is_interpreted()),
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
    )
    return row_max, inverse


def _tile(kernel: str, q: torch.Tensor) -> Tile:
    """A single query has rows of its own in the launch table."""
    name = kernel if q.shape[2] > 1 else f"{kernel}_one_query"
    return launch_table.tile(name, q.dtype, launch_table.pad_width(q.shape[3]), q.device)


def _constants(width: int, dtype: torch.dtype, sizes: Tile, upcast: bool) -> dict[str, int | bool]:
    padded = launch_table.pad_width(width)
    return {
        "WIDTH": width,
        "PADDED": padded,
        "STEP": min(padded, _F32_STEP) if dtype == torch.float32 else padded,
        "BLOCK_M": sizes.block_m,
        "BLOCK_N": sizes.block_n,
        "UPCAST": upcast,
    }


def compile_specs() -> list[CompileSpec]:
    """Every row of the launch table, on tensors whose head width is the padded one."""
    specs = []
    for (name, dtype, padded, architecture), sizes in launch_table.TABLE.items():
        if not name.startswith("token_scores_"):
            continue
        is_columns = name.startswith("token_scores_columns")
        short = launch_table.SHORT_NAMES[dtype]
        pointers = {"q_ptr": f"*{short}", "k_ptr": f"*{short}"}
        pointers |= dict.fromkeys(["max_ptr", "inverse_ptr"], "*fp32")
        strides = [f"{x}_stride_{axis}" for x in "qk" for axis in "bhn"]
        constexprs = {"q_stride_d": 1, "k_stride_d": 1, **_constants(padded, dtype, sizes, False)}
        others = {"heads": "i32", "queries": "i32", "tokens": "i32", "scale": "fp32"}
        if is_columns:
            pointers["scores_ptr"] = "*fp32"
            others |= {"max_stride_b": "i32", "max_stride_h": "i32"}
            constexprs |= {"max_stride_n": 1, "HAS_INVERSE": True}
        if name.endswith("_one_query"):
            del others["queries"]
            constexprs["queries"] = 1
            if is_columns:
                del others["max_stride_h"]
                constexprs["max_stride_h"] = 1
        specs.append(
            CompileSpec(
                name=f"{name} {short} D{padded}",
                kernel=_columns_kernel if is_columns else _rows_kernel,
                signature=pointers | dict.fromkeys(strides, "i32") | others,
                constexprs=constexprs,
                architecture=architecture,
                num_warps=sizes.num_warps,
                num_stages=sizes.num_stages,
                aligned=[*pointers, *strides],
            )
        )
    return specs
