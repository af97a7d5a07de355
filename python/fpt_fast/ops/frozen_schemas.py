"""Schemas of the ops that preloading needs; none of them has a gradient."""

import torch
from torch import Tensor

from fpt_fast.ops.checks import check_finite_scales, check_no_nan
from fpt_fast.ops.implementation import resolve
from fpt_fast.ops.schemas import define, without_gradient


def _frozen_attention(q: Tensor, k: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    out, lse = resolve("frozen_attention", impl, (q, k, v)).load()(q, k, v)
    # One layout, whoever computed it: compiled code relies on the strides of the fake.
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _frozen_attention_fake(q: Tensor, k: Tensor, v: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, width = q.shape
    out = q.new_empty((batch, tokens, heads, width)).transpose(1, 2)
    return out, q.new_empty(q.shape[:3], dtype=torch.float32)


define(
    "frozen_attention",
    "(Tensor q, Tensor k, Tensor v, str impl) -> (Tensor out, Tensor lse)",
    _frozen_attention,
    _frozen_attention_fake,
)
without_gradient("frozen_attention")


def _frozen_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    impl: str,
) -> Tensor:
    args = (x, weight, bias, activation, residual, scale)
    out: Tensor = resolve("frozen_linear", impl, args).load()(*args)
    return out.contiguous()


def _frozen_linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    scale: Tensor | None,
    impl: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define(
    "frozen_linear",
    "(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? residual, Tensor? scale,"
    " str impl) -> Tensor",
    _frozen_linear,
    _frozen_linear_fake,
)
without_gradient("frozen_linear")


def _token_scores(q: Tensor, k: Tensor, importance: str, lse: Tensor | None, impl: str) -> Tensor:
    function = resolve("token_scores", impl, (q, k, importance, lse)).load()
    scores: Tensor = function(q, k, importance, lse)
    return scores


def _token_scores_fake(
    q: Tensor, k: Tensor, importance: str, lse: Tensor | None, impl: str
) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


define(
    "token_scores",
    "(Tensor q, Tensor k, str importance, Tensor? lse, str impl) -> Tensor",
    _token_scores,
    _token_scores_fake,
)
without_gradient("token_scores")


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


define(
    "select_tokens",
    "(Tensor scores, Tensor k, Tensor v, SymInt keep, ScalarType dtype, str impl)"
    " -> (Tensor kv, Tensor index)",
    _select_tokens,
    _select_tokens_fake,
)
without_gradient("select_tokens")


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


define(
    "quantise_kv",
    "(Tensor kv, ScalarType dtype, str impl) -> (Tensor kv8, Tensor k_scales, Tensor v_scales)",
    _quantise_kv,
    _quantise_kv_fake,
)
without_gradient("quantise_kv")
