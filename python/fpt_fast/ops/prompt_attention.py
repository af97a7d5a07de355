"""``prompt_attention`` and ``prompt_attention_indexed``: prompts look at the kept tokens."""

import torch
from torch import Tensor

from fpt_fast.ops import library as _library
from fpt_fast.ops.checks import (
    EIGHT_BIT_DTYPES,
    FLOAT_DTYPES,
    check_axes,
    check_dtype,
    check_no_grad,
    check_positive,
    check_same_device,
    check_shape,
)
from fpt_fast.ops.reference import Scales

_FROZEN = "computes the gradient to q only; detach it, keys and values come from a frozen model"


def prompt_attention(
    q: Tensor,
    kv: Tensor,
    rows: Tensor | None = None,
    scales: Scales | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Attention ``softmax(q kᵀ / √D) v`` of every layer's prompts to every image's kept tokens.

    Prompts do not depend on the image.  ``rows`` picks images out of a resident store without
    copying them.  Sums and exponentials are in f32 (f64 for f64 prompts); the result is the same
    from run to run.  The gradient goes to ``q`` only.

    Args:
        q: queries of the prompts [L, H, P, D], f16, bf16, f32 or f64.
        kv: kept keys and values [M, L, 2, H, K, D], f16, bf16, f32, f64, or, with ``scales``,
            int8, float8_e4m3fn or float8_e5m2.
        rows: [B] i64, which image of ``kv`` each output is of; None for all M in order.
        scales: of 8-bit ``kv``: (per channel of K [M, L, H, D] f32, per token of V [M, L, H, K]
            f32), with ``k = kv[:, :, 0] * k_scales[..., None, :]`` and
            ``v = kv[:, :, 1] * v_scales[..., None]``.
        impl: ``"auto"`` or the name of an implementation.

    Returns:
        [L, B, P, C] of q's dtype, heads merged: ``C = H * D``.

    Raises:
        ValueError: for a wrong shape, dtype or device; for ``rows`` out of range on the CPU; for
            a ``kv`` that requires grad while grad mode is on; for 8-bit ``kv`` without
            ``scales`` or the reverse; for an implementation that cannot run.
    """
    check_axes("q", q, "L H P D")
    check_axes("kv", kv, "M L 2 H K D")
    layers, heads, _, width = q.shape
    images, kept = kv.shape[0], kv.shape[4]
    check_shape(
        "kv", kv, (images, layers, 2, heads, kept, width), "by its own M, K and q's L, H, D"
    )
    check_positive("q", q, 3, "D")
    check_positive("kv", kv, 4, "K")
    check_dtype("q", q, FLOAT_DTYPES)
    check_dtype("kv", kv, FLOAT_DTYPES + EIGHT_BIT_DTYPES)
    check_same_device("kv", kv, "q", q)
    if rows is not None:
        check_axes("rows", rows, "B")
        check_dtype("rows", rows, (torch.int64,))
        check_same_device("rows", rows, "q", q)
    if (kv.dtype in EIGHT_BIT_DTYPES) != (scales is not None):
        raise ValueError(
            "scales must be given with 8-bit kv, and only then, got "
            f"{'none' if scales is None else 'a pair'} with {kv.dtype} kv"
        )
    k_scales, v_scales = (None, None) if scales is None else scales
    if k_scales is not None and v_scales is not None:
        check_shape("scales[0]", k_scales, (images, layers, heads, width), "[M, L, H, D]")
        check_shape("scales[1]", v_scales, (images, layers, heads, kept), "[M, L, H, K]")
        for name, scale in (("scales[0]", k_scales), ("scales[1]", v_scales)):
            check_dtype(name, scale, (torch.float32,))
            check_same_device(name, scale, "q", q)
    check_no_grad(
        "prompt_attention", _FROZEN, kv=kv, **{"scales[0]": k_scales, "scales[1]": v_scales}
    )
    out, _ = _library.call("prompt_attention", q, kv, rows, k_scales, v_scales, impl)
    attended: Tensor = out
    return attended


def prompt_attention_indexed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, *, impl: str = "auto"
) -> Tensor:
    """``prompt_attention`` to tokens gathered from the frozen layers' own keys and values.

    Nothing is stored between the frozen pass and the fusion.  The gradient goes to ``q`` only.

    Args:
        q: queries of the prompts [L, H, P, D], f16, bf16, f32 or f64.
        k: keys [L, B, H, N, D], f16, bf16, f32 or f64, any strides.
        v: values [L, B, H, N, D], of k's dtype.
        index: kept tokens [B, L, H, K] i32 or i64, in 0..N-1.
        impl: ``"auto"`` or the name of an implementation.

    Returns:
        [L, B, P, C] of q's dtype, heads merged.

    Raises:
        ValueError: for a wrong shape, dtype or device; for ``index`` out of range on the CPU; for
            a ``k`` or ``v`` that requires grad while grad mode is on; for an implementation
            that cannot run.
    """
    check_axes("q", q, "L H P D")
    check_axes("k", k, "L B H N D")
    check_axes("index", index, "B L H K")
    layers, heads, _, width = q.shape
    images, tokens, kept = k.shape[1], k.shape[3], index.shape[3]
    check_shape("k", k, (layers, images, heads, tokens, width), "by its own B, N and q's L, H, D")
    check_shape("v", v, k.shape, "like k")
    check_shape("index", index, (images, layers, heads, kept), "by its own K, k's B and q's L, H")
    check_positive("q", q, 3, "D")
    check_positive("index", index, 3, "K")
    check_dtype("q", q, FLOAT_DTYPES)
    check_dtype("k", k, FLOAT_DTYPES)
    check_dtype("v", v, (k.dtype,))
    check_dtype("index", index, (torch.int32, torch.int64))
    for name, tensor in (("k", k), ("v", v), ("index", index)):
        check_same_device(name, tensor, "q", q)
    check_no_grad("prompt_attention_indexed", _FROZEN, k=k, v=v)
    out, _ = _library.call("prompt_attention_indexed", q, k, v, index, impl)
    attended: Tensor = out
    return attended
