"""``out = softmax(q kᵀ / √D) v`` of every layer's prompts and every image's kept tokens.

Prompts do not depend on the image, so a store of M images is read in place: ``rows`` says which
of them output b is of, or ``index`` which tokens of a frozen layer's own k and v were kept.

Forward: a program owns a block of prompts of one (image, layer, head) and streams its tokens
once, with a running maximum.  8-bit keys stay as they are: their scales, per channel, are folded
into q; those of the values, per token, into the probabilities.  Factors that are powers of two,
hence exact, keep what is rounded to 16 bits for a product away from the subnormal numbers.

Backward, to q only: with ``g = grad vᵀ`` and ``w`` the probabilities, image by image,

    dq = Σ w (g - mean) k / √D,    mean = Σ w g = grad · out

The stored ``out`` and log-sum-exp are rounded, so they serve as guesses, and first-order errors
are taken out after the same single pass over the tokens: with ``rest = Σ w (g - guess)`` and
``total = Σ w``, ``dq = (Σ w (g - guess) k - (rest / total) Σ w k) / total / √D``.

The sum over the batch: one program per prompt block and (layer, head), 72 of them for FPT+ on
ViT-B, would leave half a GPU idle, and atomics would make the sum depend on timing.  So the
images are cut into splits, by shape alone; a program sums its split in order and writes f32
partials [splits, L, H, P, D], which torch sums in its own fixed order.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fptkernels import launch_table
from fptkernels.launch_table import CompileSpec, Tile, pad_width
from fptkernels.primitives import LOG2E, finite_max

# Programs of the backward pass that splits aim at: several for each multiprocessor.
_PROGRAMS = 1024

Scales = tuple[Tensor, Tensor]


@triton.jit
def _place(heads, layers, prompts, BLOCK_P: tl.constexpr):
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
def _power_of_two(top):
    """Largest power of two not above ``top`` >= 0; 1 for 0."""
    power = (top.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power > 0, power, 1.0)


@triton.jit
def _fold_scales(q_tile, scales_ptr, d_idx, d_ok, stride, DOT: tl.constexpr):
    """q with the keys' scales, for products: (tile, what to multiply each row's logits by)."""
    scale_tile = tl.load(scales_ptr + d_idx * stride, mask=d_ok, other=0.0)  # [BLOCK_D]
    scaled = q_tile.to(tl.float32) * scale_tile[None, :]
    power = _power_of_two(tl.max(tl.abs(scaled), axis=1))
    return (scaled / power[:, None]).to(DOT), power


@triton.jit
def _tokens(index_ptr, start, kept, BLOCK_K: tl.constexpr):
    """Where the kept tokens ``start…`` stand, 64-bit, and which of them exist."""
    k_idx = start + tl.arange(0, BLOCK_K)
    k_ok = k_idx < kept
    if index_ptr is None:
        return k_idx.to(tl.int64), k_ok
    else:
        return tl.load(index_ptr + k_idx, mask=k_ok, other=0).to(tl.int64), k_ok


@triton.jit
def _load_kv(head_ptr, token_idx, d_idx, stride_n, stride_d, ok, DOT: tl.constexpr):
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
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, index_ptr, k_scales_ptr, v_scales_ptr, out_ptr, lse_ptr,
    kv_stride_m, kv_stride_l, kv_stride_h, kv_stride_n, kv_stride_d,
    ks_stride_m, ks_stride_l, ks_stride_h, ks_stride_d,
    vs_stride_m, vs_stride_l, vs_stride_h, vs_stride_k,
    images, layers, heads, prompts, kept, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    image, layer, head, p_idx = _place(heads, layers, prompts, BLOCK_P)
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
    q_tile = tl.load(q_ptr + q_idx, mask=pd_ok, other=0.0).to(DOT)  # [BLOCK_P, BLOCK_D]
    factor = tl.full([BLOCK_P], 1.0, tl.float32)
    if k_scales_ptr is not None:
        k_scales_ptr += row * ks_stride_m + layer * ks_stride_l + head * ks_stride_h
        v_scales_ptr += row * vs_stride_m + layer * vs_stride_l + head * vs_stride_h
        q_tile, factor = _fold_scales(q_tile, k_scales_ptr, d_idx, d_ok, ks_stride_d, DOT)
    factor *= scale
    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_P], tl.float32)
    out_tile = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)
    for start in range(0, kept, BLOCK_K):
        token_idx, k_ok = _tokens(index_ptr, start, kept, BLOCK_K)
        kd_ok = k_ok[:, None] & d_ok[None, :]
        k_tile = _load_kv(k_ptr + kv_start, token_idx, d_idx, kv_stride_n, kv_stride_d, kd_ok, DOT)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BLOCK_P, BLOCK_K]
        logits = tl.where(k_ok[None, :], logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, axis=1))
        shift = finite_max(new_top)
        # Subtracted before they are scaled: large logits lose nothing.
        weights = tl.exp2((logits - shift[:, None]) * (factor * LOG2E)[:, None])
        fade = tl.exp2((top - shift) * (factor * LOG2E))
        total = total * fade + tl.sum(weights, axis=1)
        top = new_top
        v_tile = _load_kv(v_ptr + kv_start, token_idx, d_idx, kv_stride_n, kv_stride_d, kd_ok, DOT)
        if v_scales_ptr is None:
            part = tl.dot(weights.to(DOT), v_tile, input_precision="ieee")
        else:
            v_scale = tl.load(v_scales_ptr + token_idx * vs_stride_k, mask=k_ok, other=0.0)
            power = _power_of_two(tl.max(tl.abs(v_scale), axis=0))
            weights *= (v_scale / power)[None, :]
            part = tl.dot(weights.to(DOT), v_tile, input_precision="ieee") * power
        out_tile = out_tile * fade[:, None] + part
    out_tile /= total[:, None]
    out_idx = ((layer * images + image) * prompts + p_idx[:, None]) * (heads * D)
    out_idx += head * D + d_idx[None, :]
    tl.store(out_ptr + out_idx, out_tile.to(out_ptr.dtype.element_ty), mask=pd_ok)
    lse_idx = ((layer * images + image) * heads + head) * prompts + p_idx
    tl.store(lse_ptr + lse_idx, top * factor + tl.log(total), mask=p_ok)


@triton.jit
def _image_grad(
    q_tile, factor, grad_tile, guess, lse, k_ptr, v_ptr, index_ptr, v_scales_ptr, kept,
    kv_stride_n, kv_stride_d, vs_stride_k, d_idx, d_ok,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One image's part of the gradient [BLOCK_P, BLOCK_D], without 1/√D and the keys' scales."""
    total = tl.zeros([BLOCK_P], tl.float32)
    rest = tl.zeros([BLOCK_P], tl.float32)
    near = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)  # Σ w (g - guess) k
    mean_key = tl.zeros([BLOCK_P, BLOCK_D], tl.float32)  # Σ w k
    for start in range(0, kept, BLOCK_K):
        token_idx, k_ok = _tokens(index_ptr, start, kept, BLOCK_K)
        kd_ok = k_ok[:, None] & d_ok[None, :]
        k_tile = _load_kv(k_ptr, token_idx, d_idx, kv_stride_n, kv_stride_d, kd_ok, DOT)
        v_tile = _load_kv(v_ptr, token_idx, d_idx, kv_stride_n, kv_stride_d, kd_ok, DOT)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * factor[:, None]
        exponents = tl.where(k_ok[None, :], logits - lse[:, None], float("-inf"))
        weights = tl.exp2(exponents * LOG2E)  # [BLOCK_P, BLOCK_K]
        change = tl.dot(grad_tile, tl.trans(v_tile), input_precision="ieee")
        if v_scales_ptr is not None:
            v_scale = tl.load(v_scales_ptr + token_idx * vs_stride_k, mask=k_ok, other=0.0)
            change *= v_scale[None, :]
        change = weights * (change - guess[:, None])
        total += tl.sum(weights, axis=1)
        rest += tl.sum(change, axis=1)
        power = _power_of_two(tl.max(tl.abs(change), axis=1))
        change = (change / power[:, None]).to(DOT)
        near += tl.dot(change, k_tile, input_precision="ieee") * power[:, None]
        mean_key = tl.dot(weights.to(DOT), k_tile, mean_key, input_precision="ieee")
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
    DOT: tl.constexpr,
):  # fmt: skip
    split, layer, head, p_idx = _place(heads, layers, prompts, BLOCK_P)
    d_idx = tl.arange(0, BLOCK_D).to(tl.int64)
    d_ok = d_idx < D
    p_ok = p_idx < prompts
    pd_ok = p_ok[:, None] & d_ok[None, :]
    q_idx = ((layer * heads + head) * prompts + p_idx[:, None]) * D + d_idx[None, :]
    raw_q_tile = tl.load(q_ptr + q_idx, mask=pd_ok, other=0.0).to(DOT)  # [BLOCK_P, BLOCK_D]
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
            q_tile, factor = _fold_scales(raw_q_tile, k_row_ptr, d_idx, d_ok, ks_stride_d, DOT)
        part = _image_grad(
            q_tile, factor * scale, grad_tile.to(DOT), guess, lse,
            k_ptr + kv_start, v_ptr + kv_start, index_row_ptr, v_row_ptr, kept,
            kv_stride_n, kv_stride_d, vs_stride_k, d_idx, d_ok, BLOCK_D, BLOCK_P, BLOCK_K, DOT,
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
    sizes = launch_table.tile("prompt_attention", q.dtype, pad_width(width), q.device)
    block_p = _block_p(sizes, prompts)
    _forward_kernel[(triton.cdiv(prompts, block_p) * heads * layers * tokens.images,)](
        q.contiguous(), *tokens.tensors, out, lse, *tokens.strides,
        tokens.images, layers, heads, prompts, tokens.kept, width**-0.5,
        **_constants(width, q.dtype, block_p, sizes),
        num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    return out, lse


def _backward(grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, tokens: _Tokens) -> Tensor:
    layers, heads, prompts, width = q.shape
    if out.numel() == 0:
        return q.new_zeros(q.shape)
    sizes = launch_table.tile("prompt_attention_backward", q.dtype, pad_width(width), q.device)
    block_p = _block_p(sizes, prompts)
    programs = triton.cdiv(prompts, block_p) * heads * layers
    split_images = triton.cdiv(tokens.images, max(1, _PROGRAMS // programs))
    splits = triton.cdiv(tokens.images, split_images)
    partial = q.new_empty((splits, *q.shape), dtype=torch.float32)
    _backward_kernel[(programs * splits,)](
        q.contiguous(), *tokens.tensors, out.contiguous(), lse.contiguous(), grad.contiguous(),
        partial, *tokens.strides,
        tokens.images, layers, heads, prompts, tokens.kept, width**-0.5, split_images,
        **_constants(width, q.dtype, block_p, sizes),
        num_warps=sizes.num_warps, num_stages=sizes.num_stages,
    )  # fmt: skip
    return partial.sum(0).to(q.dtype)


def _constants(width: int, dtype: torch.dtype, block_p: int, sizes: Tile) -> dict[str, object]:
    """The kernels' constexprs, at run time and for the compile report."""
    # The interpreter cannot multiply bf16.
    is_wide = dtype == torch.bfloat16 and launch_table.is_interpreted()
    dot = tl.float32 if is_wide else getattr(tl, str(dtype).removeprefix("torch."))
    sizes_of = {"D": width, "BLOCK_D": pad_width(width), "BLOCK_P": block_p}
    return {**sizes_of, "BLOCK_K": sizes.block_n, "DOT": dot}


def _block_p(sizes: Tile, prompts: int) -> int:
    """No more prompts than there are, but the 16 that a tensor core takes at least."""
    return min(sizes.block_m, max(16, triton.next_power_of_2(prompts)))


_F16, _BF16, _F32 = torch.float16, torch.bfloat16, torch.float32
_EIGHT_BIT = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
_SHORT_NAMES = {
    **launch_table.SHORT_NAMES,
    torch.float8_e5m2: "fp8e5",
    torch.uint8: "u8",
}


def compile_specs() -> list[CompileSpec]:
    """All dtypes for ViT-B (D = 64), one prompt block or many; D = 32 and 128 for a few dtypes."""
    cases = [(64, _F16, dtype, 16) for dtype in (_F16, *_EIGHT_BIT)]
    cases += [(64, _BF16, dtype, 16) for dtype in (_BF16, _F16, *_EIGHT_BIT)]
    cases += [(64, _F32, dtype, 16) for dtype in (_F32, _F16, *_EIGHT_BIT)]
    cases += [(64, _F16, _F16, 512), (64, _BF16, _BF16, 512), (64, _BF16, torch.int8, 512)]
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
    sizes = launch_table.TABLE[kernel, q_dtype, width, arch]
    block_p = _block_p(sizes, prompts)
    has_no_e4m3 = kv_dtype == torch.float8_e4m3fn and arch == "sm_80"
    q_name, kv_name = _SHORT_NAMES[q_dtype], _SHORT_NAMES[torch.uint8 if has_no_e4m3 else kv_dtype]
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
        name=f"{kernel}{'_indexed' if indexed else ''} {q_name} {kv_name} D{width} P{block_p}",
        kernel=_backward_kernel if is_backward else _forward_kernel,
        signature=signature,
        constexprs=dict.fromkeys(absent) | units | _constants(width, q_dtype, block_p, sizes),
        architecture=arch,
        num_warps=sizes.num_warps,
        num_stages=sizes.num_stages,
        aligned=[*kv_strides, *(name for name in signature if name.endswith("_ptr"))],
    )
