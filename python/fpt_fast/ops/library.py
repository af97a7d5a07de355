"""The ops as ``torch.library`` knows them: schemas, fakes, gradients, and who implements them.

An op's body looks at values that tracing cannot see (NaN, index ranges), asks
``ops/implementation.py`` which implementation runs, imports it and calls it.  A new
implementation is one ``_register`` line below; schemas and callers stay as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpt_fast.ops.checks import check_finite_scales, check_no_nan, check_values_in_range
from fpt_fast.ops.cuda_reasons import (
    cudnn_reasons,
    efficient_reasons,
    flash_reasons,
    xformers_reasons,
)
from fpt_fast.ops.implementation import (
    Implementation,
    Reasons,
    anywhere,
    needs_device,
    register,
    resolve,
)
from fpt_fast.ops.native_reasons import (
    native_floats_reasons,
    native_prompt_reasons,
    native_reasons,
)
from fpt_fast.ops.reference import Scales
from fpt_fast.ops.triton_reasons import triton_reasons

_library = torch.library.Library("fpt", "DEF")  # type: ignore[no-untyped-call]
ops = torch.ops.fpt


def _register(op: str, name: str, module: str, reasons: Reasons = anywhere) -> None:
    register(Implementation(op, name, module, op, reasons))


# Of one op, the implementation that auto prefers stands first.
_cpu = needs_device("cpu")
_register("frozen_attention", "native", "fpt_fast.ops.native", native_floats_reasons)
_register("frozen_attention", "cpu", "fpt_fast.ops.cpu", _cpu)
# No GPU has measured this order: flash takes f16 and bf16, efficient the f32 that flash does not.
for _name, _reasons in (
    ("flash", flash_reasons),
    ("efficient", efficient_reasons),
    ("cudnn", cudnn_reasons),
    ("xformers", xformers_reasons),
):
    register(
        Implementation("frozen_attention", _name, "fpt_fast.ops.cuda_attention", _name, _reasons)
    )
_register("frozen_attention", "blocked", "fpt_fast.ops.cpu")
_register("frozen_attention", "reference", "fpt_fast.ops.reference_ops")
_register("token_scores", "native", "fpt_fast.ops.native", native_floats_reasons)
_register("token_scores", "cpu", "fpt_fast.ops.cpu", _cpu)
_register("token_scores", "blocked", "fpt_fast.ops.cpu")
_register("token_scores", "reference", "fpt_fast.ops.reference_ops")
_register("select_tokens", "native", "fpt_fast.ops.native", native_reasons)
_register("select_tokens", "cpu", "fpt_fast.ops.cpu", _cpu)
_register("select_tokens", "reference", "fpt_fast.ops.reference_ops")
_register("quantise_kv", "cpu", "fpt_fast.ops.cpu", _cpu)
_register("quantise_kv", "reference", "fpt_fast.ops.reference_ops")
for _op in (
    "prompt_attention",
    "prompt_attention_backward",
    "prompt_attention_indexed",
    "prompt_attention_indexed_backward",
):
    _register(_op, "native", "fpt_fast.ops.native", native_prompt_reasons)
    _register(_op, "cpu", "fpt_fast.ops.cpu", _cpu)
    _register(_op, "reference", "fpt_fast.ops.reference_ops")
# Last, so that auto does not choose them: no GPU has run these kernels yet (issues 3 and 8).  Once
# `make device` has, they belong behind "cpu".
_register("frozen_attention", "triton", "fptkernels.frozen_attention", triton_reasons(width_of=0))
_register("token_scores", "triton", "fptkernels.token_scores", triton_reasons(width_of=0))
_register("select_tokens", "triton", "fptkernels.select_tokens", triton_reasons(width_of=1))
_register("quantise_kv", "triton", "fptkernels.quantise_kv", triton_reasons(width_of=0))
for _op in ("prompt_attention", "prompt_attention_indexed"):
    _register(_op, "triton", "fptkernels.prompt_attention", triton_reasons(width_of=0))
    _backward = f"{_op}_backward"
    _register(_backward, "triton", "fptkernels.prompt_attention", triton_reasons(width_of=1))


def _define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    _library.impl(name, body, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fpt::{name}", fake, lib=_library)


def _without_gradient(name: str) -> None:
    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"fpt::{name} has no derivative; call it on tensors without grad")

    torch.library.register_autograd(f"fpt::{name}", refuse, lib=_library)


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _pair(k_scales: Tensor | None, v_scales: Tensor | None) -> Scales | None:
    return None if k_scales is None or v_scales is None else (k_scales, v_scales)


def _frozen_attention(q: Tensor, k: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    out, lse = resolve("frozen_attention", impl, (q, k, v)).load()(q, k, v)
    # One layout, whoever computed it: compiled code relies on the strides of the fake.
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _frozen_attention_fake(q: Tensor, k: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    out = q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


_define(
    "frozen_attention",
    "(Tensor q, Tensor k, Tensor v, str impl) -> (Tensor out, Tensor lse)",
    _frozen_attention,
    _frozen_attention_fake,
)
_without_gradient("frozen_attention")


def _token_scores(q: Tensor, k: Tensor, importance: str, lse: Tensor | None, impl: str) -> Tensor:
    function = resolve("token_scores", impl, (q, k, importance, lse)).load()
    scores: Tensor = function(q, k, importance, lse)
    return scores


def _token_scores_fake(
    q: Tensor, k: Tensor, importance: str, lse: Tensor | None, impl: str
) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


_define(
    "token_scores",
    "(Tensor q, Tensor k, str importance, Tensor? lse, str impl) -> Tensor",
    _token_scores,
    _token_scores_fake,
)
_without_gradient("token_scores")


def _select_tokens(
    scores: Tensor, k: Tensor, v: Tensor, keep: int, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    check_no_nan(scores)
    function = resolve("select_tokens", impl, (scores, k, v, keep)).load()
    kv, index = function(scores, k, v, keep, dtype)
    return kv, index


def _select_tokens_fake(
    scores: Tensor, k: Tensor, v: Tensor, keep: int, dtype: torch.dtype, impl: str
) -> tuple[Tensor, Tensor]:
    batch, heads, _, width = k.shape
    kv = k.new_empty((batch, 2, heads, keep, width), dtype=dtype)
    return kv, scores.new_empty((batch, heads, keep), dtype=torch.int32)


_define(
    "select_tokens",
    "(Tensor scores, Tensor k, Tensor v, SymInt keep, ScalarType dtype, str impl)"
    " -> (Tensor kv, Tensor index)",
    _select_tokens,
    _select_tokens_fake,
)
_without_gradient("select_tokens")


def _quantise_kv(kv: Tensor, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    function = resolve("quantise_kv", impl, (kv, dtype)).load()
    kv8, k_scales, v_scales = function(kv, dtype)
    check_finite_scales(kv, k_scales, v_scales)
    return kv8, k_scales, v_scales


def _quantise_kv_fake(kv: Tensor, dtype: torch.dtype, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    images, layers, _, heads, kept, width = kv.shape
    k_scales = kv.new_empty((images, layers, heads, width), dtype=torch.float32)
    v_scales = kv.new_empty((images, layers, heads, kept), dtype=torch.float32)
    return kv.new_empty(kv.shape, dtype=dtype), k_scales, v_scales


_define(
    "quantise_kv",
    "(Tensor kv, ScalarType dtype, str impl) -> (Tensor kv8, Tensor k_scales, Tensor v_scales)",
    _quantise_kv,
    _quantise_kv_fake,
)
_without_gradient("quantise_kv")


def _prompt_attention(
    q: Tensor,
    kv: Tensor,
    rows: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    if rows is not None:
        check_values_in_range("rows", rows, kv.shape[0], "images of kv")
    scales = _pair(k_scales, v_scales)
    function = resolve("prompt_attention", impl, (q, kv, rows, scales)).load()
    out, lse = function(q, kv, rows, scales)
    return out, lse


def _prompt_attention_fake(
    q: Tensor,
    kv: Tensor,
    rows: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor]:
    layers, heads, prompts, width = q.shape
    images = kv.shape[0] if rows is None else rows.shape[0]
    lse = q.new_empty((layers, images, heads, prompts), dtype=_lse_dtype(q))
    return q.new_empty((layers, images, prompts, heads * width)), lse


def _prompt_attention_backward(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    impl: str,
) -> Tensor:
    scales = _pair(k_scales, v_scales)
    args = (grad, q, kv, out, lse, rows, scales)
    grad_q: Tensor = resolve("prompt_attention_backward", impl, args).load()(*args)
    return grad_q


def _prompt_attention_backward_fake(
    grad: Tensor,
    q: Tensor,
    kv: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    impl: str,
) -> Tensor:
    return q.new_empty(q.shape)


def _save_prompt_attention(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, kv, rows, k_scales, v_scales, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, kv, *output, rows, k_scales, v_scales)


def _prompt_attention_gradient(
    ctx: Any, grad: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_q = ops.prompt_attention_backward(grad, *ctx.saved_tensors, ctx.impl)
    return grad_q, None, None, None, None, None


_define(
    "prompt_attention",
    "(Tensor q, Tensor kv, Tensor? rows, Tensor? k_scales, Tensor? v_scales, str impl)"
    " -> (Tensor out, Tensor lse)",
    _prompt_attention,
    _prompt_attention_fake,
)
_define(
    "prompt_attention_backward",
    "(Tensor grad, Tensor q, Tensor kv, Tensor out, Tensor lse, Tensor? rows,"
    " Tensor? k_scales, Tensor? v_scales, str impl) -> Tensor",
    _prompt_attention_backward,
    _prompt_attention_backward_fake,
)
torch.library.register_autograd(
    "fpt::prompt_attention",
    _prompt_attention_gradient,
    setup_context=_save_prompt_attention,
    lib=_library,
)
_without_gradient("prompt_attention_backward")


def _prompt_attention_indexed(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    check_values_in_range("index", index, k.shape[3], "tokens of k")
    function = resolve("prompt_attention_indexed", impl, (q, k, v, index)).load()
    out, lse = function(q, k, v, index)
    return out, lse


def _prompt_attention_indexed_fake(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, impl: str
) -> tuple[Tensor, Tensor]:
    layers, heads, prompts, width = q.shape
    images = index.shape[0]
    lse = q.new_empty((layers, images, heads, prompts), dtype=_lse_dtype(q))
    return q.new_empty((layers, images, prompts, heads * width)), lse


def _prompt_attention_indexed_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    impl: str,
) -> Tensor:
    args = (grad, q, k, v, index, out, lse)
    grad_q: Tensor = resolve("prompt_attention_indexed_backward", impl, args).load()(*args)
    return grad_q


def _prompt_attention_indexed_backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    out: Tensor,
    lse: Tensor,
    impl: str,
) -> Tensor:
    return q.new_empty(q.shape)


def _save_prompt_attention_indexed(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    q, k, v, index, ctx.impl = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, index, *output)


def _prompt_attention_indexed_gradient(
    ctx: Any, grad: Tensor, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad_q = ops.prompt_attention_indexed_backward(grad, *ctx.saved_tensors, ctx.impl)
    return grad_q, None, None, None, None


_define(
    "prompt_attention_indexed",
    "(Tensor q, Tensor k, Tensor v, Tensor index, str impl) -> (Tensor out, Tensor lse)",
    _prompt_attention_indexed,
    _prompt_attention_indexed_fake,
)
_define(
    "prompt_attention_indexed_backward",
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor index, Tensor out, Tensor lse, str impl)"
    " -> Tensor",
    _prompt_attention_indexed_backward,
    _prompt_attention_indexed_backward_fake,
)
torch.library.register_autograd(
    "fpt::prompt_attention_indexed",
    _prompt_attention_indexed_gradient,
    setup_context=_save_prompt_attention_indexed,
    lib=_library,
)
_without_gradient("prompt_attention_indexed_backward")
