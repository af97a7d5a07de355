"""``side_block``: a whole layer of the side network."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from fpt_fast.ops import library as _library
from fpt_fast.ops.checks import (
    FLOAT_DTYPES,
    check_axes,
    check_dtype,
    check_same_device,
    check_shape,
)
from fpt_fast.ops.implementation import AUTO, resolve
from fpt_fast.ops.side_attention import side_attention

_TORCH = "torch"
_PRODUCTS = ("float32", "bfloat16")


class SideWeights(NamedTuple):
    """Weights of a pre-norm transformer layer of width ``S``, as ``torch.nn`` has them."""

    norm1: Tensor  # [S]
    norm1_bias: Tensor
    qkv: Tensor  # [3 S, S]
    qkv_bias: Tensor
    proj: Tensor  # [S, S]
    proj_bias: Tensor
    norm2: Tensor  # [S]
    norm2_bias: Tensor
    fc1: Tensor  # [MLP width, S]
    fc1_bias: Tensor
    fc2: Tensor  # [S, MLP width]
    fc2_bias: Tensor


def side_block(
    tokens: Tensor,
    prompts: Tensor | None,
    weights: SideWeights,
    *,
    heads: int,
    queries: int | None = None,
    eps: float = 1e-12,
    products: str = "float32",
    impl: str = "auto",
) -> Tensor:
    """Pre-norm attention over ``[tokens, prompts]`` and MLP, each added to the tokens.

    ``x = tokens + proj(attention(norm1([tokens, prompts])))``, then
    ``x + fc2(gelu(fc1(norm2(x))))`` with the exact GELU.  Prompts are keys and
    values alone.  Gradients go to everything; the result is the same from run to run.
    ``"torch"`` is torch's own operations and gradient, under the caller's autocast; ``"auto"`` is
    that, too, in compiled code, which fuses them.

    Args:
        tokens: [B, T, S], f16, bf16, f32 or f64.
        prompts: [B, P, S] of any of these dtypes, or None.
        weights: of tokens' dtype and device.
        heads: attention heads; they divide S.
        queries: how many tokens come back, the first ones; None for all.
        eps: of both LayerNorms.
        products: ``"bfloat16"`` allows ``"native"`` to round the factors of its matrix products to
            bf16, with sums in f32; all else stays in f32.
        impl: ``"auto"`` or the name of an implementation.

    Returns:
        [B, queries, S] of tokens' dtype.

    Raises:
        ValueError: for a wrong shape, dtype or device; for an implementation that cannot run.
    """
    _check(tokens, prompts, weights, heads, products)
    queries = tokens.shape[1] if queries is None else queries
    if not 1 <= queries <= tokens.shape[1]:
        raise ValueError(f"queries must be in 1..{tokens.shape[1]} (T), got {queries}")
    args = (tokens, prompts, weights, heads)
    if impl == AUTO:
        is_compiling = torch.compiler.is_compiling()
        impl = _TORCH if is_compiling else resolve("side_block", impl, args).name
    if impl == _TORCH:
        return _block(tokens, prompts, weights, heads, queries, eps)
    if prompts is None:
        prompts = tokens[:, :0]
    narrow = products == "bfloat16"
    out, _, _ = _library.ops.side_block(
        tokens, prompts.to(tokens.dtype), *weights, heads, queries, eps, narrow, impl
    )
    block: Tensor = out
    return block


def _check(
    tokens: Tensor, prompts: Tensor | None, weights: SideWeights, heads: int, products: str
) -> None:
    check_axes("tokens", tokens, "B T S")
    check_dtype("tokens", tokens, FLOAT_DTYPES)
    batch, _, width = tokens.shape
    if prompts is not None:
        check_axes("prompts", prompts, "B P S")
        expected = (batch, prompts.shape[1], width)
        check_shape("prompts", prompts, expected, "by its own P and tokens' B, S")
        check_dtype("prompts", prompts, FLOAT_DTYPES)
        check_same_device("prompts", prompts, "tokens", tokens)
    hidden = weights.fc1.shape[0]
    shapes = {
        "qkv": (3 * width, width),
        "qkv_bias": (3 * width,),
        "proj": (width, width),
        "fc1": (hidden, width),
        "fc1_bias": (hidden,),
        "fc2": (width, hidden),
    }
    for name, weight in weights._asdict().items():
        check_shape(name, weight, shapes.get(name, (width,)), "by tokens' S and fc1's rows")
        check_dtype(name, weight, (tokens.dtype,))
        check_same_device(name, weight, "tokens", tokens)
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide tokens' S, {width}, got {heads}")
    if products not in _PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(_PRODUCTS)}, got {products!r}")


def _block(
    tokens: Tensor,
    prompts: Tensor | None,
    weights: SideWeights,
    heads: int,
    queries: int,
    eps: float,
) -> Tensor:
    seen = tokens if prompts is None else torch.cat((tokens, prompts), dim=1)
    width = (tokens.shape[2],)
    normed = functional.layer_norm(seen, width, weights.norm1, weights.norm1_bias, eps)
    attended = _attend(normed, weights, heads, queries)
    x = tokens[:, :queries] + functional.linear(attended, weights.proj, weights.proj_bias)
    normed = functional.layer_norm(x, width, weights.norm2, weights.norm2_bias, eps)
    inner = functional.gelu(functional.linear(normed, weights.fc1, weights.fc1_bias))
    return x + functional.linear(inner, weights.fc2, weights.fc2_bias)


def _attend(seen: Tensor, weights: SideWeights, heads: int, queries: int) -> Tensor:
    batch, length, width = seen.shape
    shape = (heads, width // heads)
    if queries == 1:
        # One product for all three would compute queries for every token, to use one.
        q = functional.linear(seen[:, :1], weights.qkv[:width], weights.qkv_bias[:width])
        kv = functional.linear(seen, weights.qkv[width:], weights.qkv_bias[width:])
        q = q.view(batch, 1, *shape)
        k, v = kv.view(batch, length, 2, *shape).unbind(2)
    else:
        qkv = functional.linear(seen, weights.qkv, weights.qkv_bias)
        q, k, v = qkv.view(batch, length, 3, *shape).unbind(2)
        q = q[:, :queries]
    attended = side_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return attended.transpose(1, 2).reshape(batch, queries, width)
