"""``out = softmax(q kᵀ / √D) v`` of every layer's prompts and every image's kept tokens.

Prompts do not depend on the image, so a store of M images is read in place: ``rows`` says which
of them output b is of, or ``index`` which tokens of a frozen layer's own k and v were kept.

Forward: a program owns a block of prompts of one (image, layer, head) and streams its tokens
once, with a running maximum.  8-bit keys stay as they are: their scales, per channel, are folded
into q; those of the values, per token, into the probabilities.  f32 q, as in training, is
multiplied on tensor cores in parts of 16 bits (``prompt_products``), unless keys are f32 too.
Factors that are powers of two, hence exact, keep those parts away from the subnormal numbers.

Backward, to q only: with ``g = grad vᵀ`` and ``w`` the probabilities, image by image,

    dq = Σ w (g - mean) k / √D,    mean = Σ w g = grad · out

The stored ``out`` and log-sum-exp are rounded, so they serve as guesses, and first-order errors
are taken out after the same single pass over the tokens: with ``rest = Σ w (g - guess)`` and
``total = Σ w``, ``dq = (Σ w (g - guess) k - (rest / total) Σ w k) / total / √D``.

The sum over the batch: one program per prompt block and (layer, head), 72 of them for FPT+ on
ViT-B, would leave half a GPU idle, and atomics would make the sum depend on timing.  So the
images are cut into splits, by shape alone; a program sums its split in order and writes f32
partials [splits, L, H, P, D], which torch sums in its own fixed order.

Counted traffic of 16 images of FPT+ on ViT-B, f32 q: forward 65.5 MB (60.5 of f16 tokens, 5.1 of
q, out and log-sum-exp), 36.6 MB with 8-bit tokens: 15 and 9 µs at 4.3 TB/s.  Backward 80.0 and
51.1 MB (9.4 of them partials, which the L2 cache holds): 19 and 12 µs.  1.0 and 1.9 GFLOP: f32
arithmetic would take longer than the bytes, 2 to 3 products of 16 bits do not.  P = 512 is bound
by products.  None of this has been measured on a GPU yet.

What is not finite in a head's tokens, q or scales makes its outputs NaN; where q is not taken in
parts, a logit of minus infinity weighs nothing.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fptkernels import launch_table
from fptkernels.launch_table import SHORT_NAMES, CompileSpec, Tile, pad_width
from fptkernels.primitives import LOG2E, finite_max
from fptkernels.prompt_products import (
    HEADROOM,
    dot_in_parts,
    fold_scales,
    kept_tokens,
    level,
    load_as,
    power_of_two,
    program_place,
)

# Programs of the backward pass that splits aim at: about nine for each multiprocessor of an H200,
# so that the last of them leave few idle; 16 images of FPT+ on ViT-B become 16 splits.
_PROGRAMS = 1200

Scales = tuple[Tensor, Tensor]


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, index_ptr, k_scales_ptr, v_scales_ptr, out_ptr, lse_ptr,
    kv_stride_m, kv_stride_l, kv_stride_h, kv_stride_n, kv_stride_d,
    ks_stride_m, ks_stride_l, ks_stride_h, ks_stride_d,
    vs_stride_m, vs_stride_l, vs_stride_h, vs_stride_k,
    images, layers, heads, prompts, kept, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    image, layer, head, p_idx = program_place(heads, layers, prompts, BLOCK_P)
    row = image
    if rows_ptr is not None:
        row = tl.load(rows_ptr + image)
    if index_ptr is not None:
        index_ptr += ((image * layers + layer) * heads + head) * kept
    kv_start = row * kv_stride_m + layer * kv_stride_l + head * kv_stride_h
    d_idx = tl.arange(0, BLOCK_D).to(tl.int64)
    d_ok = d_idx < D
    p_ok = p_idx < prompts
    pd_ok = p_ok[:, None] & d_ok[None, :]
    q_idx = ((layer * heads + head) * prompts + p_idx[:, None]) * D + d_idx[None, :]
    q_tile = tl.load(q_ptr + q_idx, mask=pd_ok, other=0.0)  # [BLOCK_P, BLOCK_D]
    factor = tl.full([BLOCK_P], 1.0, tl.float32)
    if k_scales_ptr is not None:
        k_scales_ptr += row * ks_stride_m + layer * ks_stride_l + head * ks_stride_h
        v_scales_ptr += row * vs_stride_m + layer * vs_stride_l + head * vs_stride_h
        q_tile = fold_scales(q_tile, k_scales_ptr, d_idx, d_ok, ks_stride_d)
    if k_scales_ptr is not None or PARTS > 1:
        q_tile, factor = level(q_tile)
    factor *= scale
    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    out_tile = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, kept, BLOCK_K):
        token_idx, k_ok = kept_tokens(index_ptr, start, kept, BLOCK_K)
        kd_ok = k_ok[:, None] & d_ok[None, :]
        k_tile = load_as(k_ptr + kv_start, token_idx, d_idx, kv_stride_n, kv_stride_d, kd_ok, DOT)
        logits = dot_in_parts(q_tile, tl.trans(k_tile), 3 if PARTS > 1 else 1)  # [BLOCK_P, BLOCK_K]
        logits = tl.where(k_ok[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        shift = finite_max(new_top)
        # Subtracted before they are scaled: large logits lose nothing.
        weights = tl.exp2((logits - shift[:, None]) * (factor * LOG2E)[:, None]) * HEADROOM
        fade = tl.exp2((top - shift) * (factor * LOG2E))
        total = total * fade + tl.sum(weights, axis=1)
        top = new_top
        v_tile = load_as(v_ptr + kv_start, token_idx, d_idx, kv_stride_n, kv_stride_d, kd_ok, DOT)
        if v_scales_ptr is None:
            part = dot_in_parts(weights, v_tile, PARTS)
        else:
            v_scale = tl.load(v_scales_ptr + token_idx * vs_stride_k, mask=k_ok, other=0.0)
            power = power_of_two(tl.max(tl.abs(v_scale), axis=0))
            weights *= (v_scale / power)[None, :]
            part = dot_in_parts(weights, v_tile, PARTS) * power
        out_tile = out_tile * fade[:, None] + part
    out_tile /= total[:, None]
    out_idx = ((layer * images + image) * prompts + p_idx[:, None]) * (heads * D)
    out_idx += head * D + d_idx[None, :]
    tl.store(out_ptr + out_idx, out_tile.to(out_ptr.dtype.element_ty), mask=pd_ok)
    lse_idx = ((layer * images + image) * heads + head) * prompts + p_idx
    tl.store(lse_ptr + lse_idx, top * factor + tl.log(total / HEADROOM), mask=p_ok)


@triton.jit
def _image_grad(
    q_tile, factor, grad_tile, grad_factor, guess, lse, k_ptr, v_ptr, index_ptr, v_scales_ptr, kept,
    kv_stride_n, kv_stride_d, vs_stride_k, d_idx, d_ok,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """One image's part of the gradient [BLOCK_P, BLOCK_D], without 1/√D and the keys' scales."""
    total = tl.zeros([BLOCK_P], tl.float32)
    rest = tl.zeros([BLOCK_P], tl.float32)
    near = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)  # Σ w (g - guess) k
    mean_key = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)  # Σ w k
    for start in range(0, kept, BLOCK_K):
        token_idx, k_ok = kept_tokens(index_ptr, start, kept, BLOCK_K)
        kd_ok = k_ok[:, None] & d_ok[None, :]
        k_tile = load_as(k_ptr, token_idx, d_idx, kv_stride_n, kv_stride_d, kd_ok, DOT)
        v_tile = load_as(v_ptr, token_idx, d_idx, kv_stride_n, kv_stride_d, kd_ok, DOT)
        logits = dot_in_parts(q_tile, tl.trans(k_tile), 3 if PARTS > 1 else 1) * factor[:, None]
        exponents = tl.where(k_ok[None, :], logits - lse[:, None], float("-inf"))
        weights = tl.exp2(exponents * LOG2E) * HEADROOM  # [BLOCK_P, BLOCK_K]
        change = dot_in_parts(grad_tile, tl.trans(v_tile), PARTS) * grad_factor[:, None]
        if v_scales_ptr is not None:
            v_scale = tl.load(v_scales_ptr + token_idx * vs_stride_k, mask=k_ok, other=0.0)
            change *= v_scale[None, :]
        change = weights * (change - guess[:, None])
        total += tl.sum(weights, axis=1)
        rest += tl.sum(change, axis=1)
        change, change_factor = level(change)
        near += dot_in_parts(change, k_tile, PARTS) * change_factor[:, None]
        # One part is enough: what it is multiplied by is of the size of a rounding error.
        mean_key += dot_in_parts(weights, k_tile, 1)
    return (near - (rest / total)[:, None] * mean_key) / total[:, None]


@triton.jit
def _backward_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, index_ptr, k_scales_ptr, v_scales_ptr, out_ptr, lse_ptr,
    grad_ptr, partial_ptr,
    kv_stride_m, kv_stride_l, kv_stride_h, kv_stride_n, kv_stride_d,
    ks_stride_m, ks_stride_l, ks_stride_h, ks_stride_d,
    vs_stride_m, vs_stride_l, vs_stride_h, vs_stride_k,
    images, layers, heads, prompts, kept, scale, split_images,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    split, layer, head, p_idx = program_place(heads, layers, prompts, BLOCK_P)
    d_idx = tl.arange(0, BLOCK_D).to(tl.int64)
    d_ok = d_idx < D
    p_ok = p_idx < prompts
    pd_ok = p_ok[:, None] & d_ok[None, :]
    q_idx = ((layer * heads + head) * prompts + p_idx[:, None]) * D + d_idx[None, :]
    raw_q_tile = tl.load(q_ptr + q_idx, mask=pd_ok, other=0.0)  # [BLOCK_P, BLOCK_D]
    grad_q = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    last = tl.minimum((split + 1) * split_images, images)
    for image in range(split * split_images, last):
        row = image
        if rows_ptr is not None:
            row = tl.load(rows_ptr + image)
        index_row_ptr = index_ptr
        if index_ptr is not None:
            index_row_ptr = index_ptr + ((image * layers + layer) * heads + head) * kept
        kv_start = row * kv_stride_m + layer * kv_stride_l + head * kv_stride_h
        out_idx = ((layer * images + image) * prompts + p_idx[:, None]) * (heads * D)
        out_idx += head * D + d_idx[None, :]
        grad_tile = tl.load(grad_ptr + out_idx, mask=pd_ok, other=0.0)  # [BLOCK_P, BLOCK_D]
        out_tile = tl.load(out_ptr + out_idx, mask=pd_ok, other=0.0)  # [BLOCK_P, BLOCK_D]
        guess = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), axis=1)
        lse_idx = ((layer * images + image) * heads + head) * prompts + p_idx
        lse = tl.load(lse_ptr + lse_idx, mask=p_ok, other=0.0)
        q_tile = raw_q_tile
        factor = tl.full([BLOCK_P], 1.0, tl.float32)
        v_row_ptr = v_scales_ptr
        if k_scales_ptr is not None:
            k_row_ptr = k_scales_ptr + row * ks_stride_m + layer * ks_stride_l + head * ks_stride_h
            v_row_ptr = v_scales_ptr + row * vs_stride_m + layer * vs_stride_l + head * vs_stride_h
            q_tile = fold_scales(raw_q_tile, k_row_ptr, d_idx, d_ok, ks_stride_d)
        if k_scales_ptr is not None or PARTS > 1:
            q_tile, factor = level(q_tile)
        grad_factor = tl.full([BLOCK_P], 1.0, tl.float32)
        if PARTS > 1:
            grad_tile, grad_factor = level(grad_tile)
        part = _image_grad(
            q_tile, factor * scale, grad_tile, grad_factor, guess, lse,
            k_ptr + kv_start, v_ptr + kv_start, index_row_ptr, v_row_ptr, kept,
            kv_stride_n, kv_stride_d, vs_stride_k, d_idx, d_ok, BLOCK_D, BLOCK_P, BLOCK_K,
            DOT, PARTS,
        )  # fmt: skip
        if k_scales_ptr is not None:
            part *= tl.load(k_row_ptr + d_idx * ks_stride_d, mask=d_ok, other=0.0)[None, :]
        grad_q += part
    partial_idx = split * layers * heads * prompts * D + q_idx
    tl.store(partial_ptr + partial_idx, grad_q * scale, mask=pd_ok)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Kept tokens of a store [M, L, H, ·, D]: of the images ``rows``, or those of ``index``."""

    keys: Tensor
    values: Tensor
    rows: Tensor | None = None
    index: Tensor | None = None
    scales: Scales | None = None

    @classmethod
    def stored(cls, kv: Tensor, rows: Tensor | None, scales: Scales | None) -> "_Tokens":
        """Of kv [M, L, 2, H, K, D]; before sm_89, e4m3 is not a type but bits to be decoded."""
        if kv.dtype == torch.float8_e4m3fn and launch_table.architecture(kv.device) == "sm_80":
            kv = kv.view(torch.uint8)
        return cls(
            kv[:, :, 0], kv[:, :, 1], rows if rows is None else rows.contiguous(), None, scales
        )

    @classmethod
    def indexed(cls, k: Tensor, v: Tensor, index: Tensor) -> "_Tokens":
        """Of k, v [L, B, H, N, D], which the kernels want in the same strides."""
        if k.stride() != v.stride():
            k, v = k.contiguous(), v.contiguous()
        return cls(k.transpose(0, 1), v.transpose(0, 1), None, index.contiguous())

    @property
    def images(self) -> int:
        return self.keys.shape[0] if self.rows is None else self.rows.shape[0]

    @property
    def kept(self) -> int:
        return self.keys.shape[3] if self.index is None else self.index.shape[3]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """From ``k_ptr`` to ``v_scales_ptr``."""
        return self.keys, self.values, self.rows, self.index, *(self.scales or (None, None))

    @property
    def strides(self) -> tuple[int, ...]:
        """From ``kv_stride_m`` to ``vs_stride_k``."""
        of_scales = [stride for scale in self.scales or () for stride in scale.stride()]
        return *self.keys.stride(), *(of_scales or [0] * 8)


def prompt_attention(
    q: Tensor, kv: Tensor, rows: Tensor | None, scales: Scales | None
) -> tuple[Tensor, Tensor]:
    """Output [L, B, P, C] of q's dtype and log-sum-exp [L, B, H, P] f32 for q [L, H, P, D]."""
    return _forward(q, _Tokens.stored(kv, rows, scales))


def prompt_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    scales: Scales | None,
) -> Tensor:
    """Gradient to q [L, H, P, D], of q's dtype."""
    return _backward(grad, q, out, lse, _Tokens.stored(kv, rows, scales))


def prompt_attention_indexed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """``prompt_attention`` to tokens ``index`` [B, L, H, K] of k, v [L, B, H, N, D]."""
    return _forward(q, _Tokens.indexed(k, v, index))


def prompt_attention_indexed_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, index: Tensor, out: Tensor, lse: Tensor
) -> Tensor:
    """Gradient to q [L, H, P, D], of q's dtype."""
    return _backward(grad, q, out, lse, _Tokens.indexed(k, v, index))


def _forward(q: Tensor, tokens: _Tokens) -> tuple[Tensor, Tensor]:
    layers, heads, prompts, width = q.shape
    out = q.new_empty((layers, tokens.images, prompts, heads * width))
    lse = q.new_empty((layers, tokens.images, heads, prompts), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    dot, parts = _products_here(q.dtype, tokens.keys.dtype)
    sizes = launch_table.tile("prompt_attention", dot, pad_width(width), q.device)
    block_p = _block_p(sizes, prompts)
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(prompts, block_p) * heads * layers * tokens.images,)](
            q.contiguous(), *tokens.tensors, out, lse, *tokens.strides,
            tokens.images, layers, heads, prompts, tokens.kept, width**-0.5,
            **_constants(width, dot, parts, block_p, sizes),
            num_warps=_warps(sizes, block_p), num_stages=sizes.num_stages,
        )  # fmt: skip
    return out, lse


def _backward(grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, tokens: _Tokens) -> Tensor:
    layers, heads, prompts, width = q.shape
    if out.numel() == 0:
        return q.new_zeros(q.shape)
    dot, parts = _products_here(q.dtype, tokens.keys.dtype)
    name = _row("prompt_attention_backward", tokens.keys.dtype)
    sizes = launch_table.tile(name, dot, pad_width(width), q.device)
    block_p = _block_p(sizes, prompts)
    programs = triton.cdiv(prompts, block_p) * heads * layers
    split_images = triton.cdiv(tokens.images, max(1, _PROGRAMS // programs))
    splits = triton.cdiv(tokens.images, split_images)
    partial = q.new_empty((splits, *q.shape), dtype=torch.float32)
    with torch.cuda.device_of(q):
        _backward_kernel[(programs * splits,)](
            q.contiguous(), *tokens.tensors, out.contiguous(), lse.contiguous(), grad.contiguous(),
            partial, *tokens.strides,
            tokens.images, layers, heads, prompts, tokens.kept, width**-0.5, split_images,
            **_constants(width, dot, parts, block_p, sizes),
            num_warps=_warps(sizes, block_p), num_stages=sizes.num_stages,
        )  # fmt: skip
    return partial.sum(0).to(q.dtype)


def _products(q_dtype: torch.dtype, kv_dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """Dtype that tensor cores multiply in, and of how many such numbers a f32 is the sum."""
    if q_dtype != torch.float32 or kv_dtype == torch.float32:
        return q_dtype, 1
    if kv_dtype == torch.bfloat16:
        return torch.bfloat16, 3
    return torch.float16, 2  # f16 holds every value of the 8-bit dtypes


def _products_here(q_dtype: torch.dtype, kv_dtype: torch.dtype) -> tuple[torch.dtype, int]:
    """``_products``, but for the interpreter, which cannot multiply bf16."""
    dot, parts = _products(q_dtype, kv_dtype)
    if dot == torch.bfloat16 and launch_table.is_interpreted():
        return torch.float32, 1
    return dot, parts


def _row(kernel: str, kv_dtype: torch.dtype) -> str:
    """The kernel's name in the launch table: 8-bit tokens cost the backward pass registers."""
    is_heavy = kernel == "prompt_attention_backward" and kv_dtype.itemsize == 1
    return f"{kernel}_8bit" if is_heavy else kernel


def _constants(
    width: int, dot: torch.dtype, parts: int, block_p: int, sizes: Tile
) -> dict[str, object]:
    """The kernels' constexprs, at run time and for the compile report."""
    sizes_of = {"D": width, "BLOCK_D": pad_width(width), "BLOCK_P": block_p}
    dot_type = getattr(tl, str(dot).removeprefix("torch."))
    return {**sizes_of, "BLOCK_K": sizes.block_n, "DOT": dot_type, "PARTS": parts}


def _warps(sizes: Tile, block_p: int) -> int:
    """As many as the table has for its rows, fewer for fewer, but four."""
    return max(4, sizes.num_warps * block_p // sizes.block_m)


def _block_p(sizes: Tile, prompts: int) -> int:
    """No more prompts than there are, but the 16 that a tensor core takes at least."""
    return min(sizes.block_m, max(16, triton.next_power_of_2(prompts)))


_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32
_EIGHT_BIT = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def compile_specs() -> list[CompileSpec]:
    """All dtypes for ViT-B (D = 64), one prompt block or many; D = 32 and 128 for a few dtypes."""
    cases = [(64, _F16, dtype, 16) for dtype in (_F16, *_EIGHT_BIT)]
    cases += [(64, _BF16, dtype, 16) for dtype in (_BF16, _F16, *_EIGHT_BIT)]
    cases += [(64, _F32, dtype, 16) for dtype in (_F32, _F16, *_EIGHT_BIT)]
    cases += [(64, _F16, _F16, 512), (64, _BF16, _BF16, 512), (64, _BF16, torch.int8, 512)]
    cases += [(64, _F32, _F16, 512), (64, _F32, torch.int8, 512), (64, _F32, _BF16, 16)]
    for width in (32, 128):
        cases += [(width, _F16, _F16, 512), (width, _F32, _F32, 16), (width, _BF16, torch.int8, 16)]
    specs = []
    for arch in launch_table.ARCHITECTURES:
        for kernel in ("prompt_attention", "prompt_attention_backward"):
            specs += [_spec(kernel, arch, *case) for case in cases]
            specs += [_spec(kernel, arch, 64, t, t, 16, indexed=True) for t in (_F16, _BF16, _F32)]
    return specs


def _spec(
    kernel: str,
    arch: str,
    width: int,
    q_dtype: torch.dtype,
    kv_dtype: torch.dtype,
    prompts: int,
    indexed: bool = False,
) -> CompileSpec:
    """A contiguous store, picked from by rows, or a frozen layer's own k and v with an index."""
    dot, parts = _products(q_dtype, kv_dtype)
    row = _row(kernel, kv_dtype)
    sizes = launch_table.TABLE[row, dot, width, arch]
    block_p = _block_p(sizes, prompts)
    has_no_e4m3 = kv_dtype == torch.float8_e4m3fn and arch == "sm_80"
    q_name, kv_name = SHORT_NAMES[q_dtype], SHORT_NAMES[torch.uint8 if has_no_e4m3 else kv_dtype]
    signature = {"index_ptr": "*i32"} if indexed else {"rows_ptr": "*i64"}
    signature |= dict.fromkeys(("q_ptr", "out_ptr"), f"*{q_name}") | {"lse_ptr": "*fp32"}
    signature |= dict.fromkeys(("k_ptr", "v_ptr"), f"*{kv_name}")
    if is_backward := kernel.endswith("_backward"):
        signature |= {"grad_ptr": f"*{q_name}", "partial_ptr": "*fp32", "split_images": "i32"}
    absent = ["rows_ptr" if indexed else "index_ptr"]
    scale_strides = [f"{x}s_stride_{axis}" for x in "kv" for axis in "mlh"]
    if kv_dtype in _EIGHT_BIT:
        signature |= {"k_scales_ptr": "*fp32", "v_scales_ptr": "*fp32"}
        signature |= dict.fromkeys(scale_strides, "i64")
    else:
        absent += ["k_scales_ptr", "v_scales_ptr", *scale_strides]
    kv_strides = [f"kv_stride_{axis}" for axis in "mlhn"]
    counts = ("images", "layers", "heads", "prompts", "kept")
    signature |= dict.fromkeys(kv_strides, "i64") | dict.fromkeys(counts, "i32") | {"scale": "fp32"}
    units = dict.fromkeys(("kv_stride_d", "ks_stride_d", "vs_stride_k"), 1)
    return CompileSpec(
        name=f"{row}{'_indexed' if indexed else ''} {q_name} {kv_name} D{width} P{block_p}",
        kernel=_backward_kernel if is_backward else _forward_kernel,
        signature=signature,
        constexprs=dict.fromkeys(absent) | units | _constants(width, dot, parts, block_p, sizes),
        architecture=arch,
        num_warps=_warps(sizes, block_p),
        num_stages=sizes.num_stages,
        aligned=[*kv_strides, *(name for name in signature if name.endswith("_ptr"))],
    )
