"""``side_layers``: whole layers of the side network."""

from collections.abc import Sequence
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
from fpt_fast.ops.direct import is_watched
from fpt_fast.ops.implementation import AUTO, resolve
from fpt_fast.ops.side_attention import side_attention
from fpt_fast.ops.side_direct import side_layers_directly

_NATIVE, _TORCH = "native", "torch"
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


def side_layers(
    tokens: Tensor,
    states: Tensor | None,
    layers: Sequence[SideWeights],
    *,
    heads: int,
    queries: int | None = None,
    eps: float = 1e-12,
    products: str = "float32",
    impl: str = "auto",
) -> Tensor:
    """Layers of the side network, one after the other, in one node of autograd.

    Each is ``x = tokens + proj(attention(norm1([tokens, prompts])))``, then
    ``x + fc2(gelu(fc1(norm2(x))))`` with the exact GELU.  A layer's prompts are keys and values
    alone.  Gradients go to everything; the result is the same from run to run.
    ``"torch"`` is torch's own operations and gradient, under the caller's autocast; ``"auto"`` is
    that, too, in compiled code, which fuses them.

    Args:
        tokens: [B, T, S], f16, bf16, f32 or f64.
        states: prompts of every layer [L, B, P, S] of any of these dtypes, or None.
        layers: the weights of L layers, all of the same sizes and of tokens' dtype and device.
        heads: attention heads; they divide S.
        queries: how many tokens come back from the last layer, the first ones; None for all.
        eps: of all LayerNorms.
        products: ``"bfloat16"`` allows ``"native"`` to round the factors of its matrix products to
            bf16, the attention's too, with sums in f32, and GELU to be exact to 3e-5; all else
            stays in f32.
        impl: ``"auto"`` or the name of an implementation.

    Returns:
        [B, queries, S] of tokens' dtype.

    Raises:
        ValueError: for a wrong shape, dtype or device; for an implementation that cannot run.
    """
    _check(tokens, states, layers, heads, products)
    queries = tokens.shape[1] if queries is None else queries
    if not 1 <= queries <= tokens.shape[1]:
        raise ValueError(f"queries must be in 1..{tokens.shape[1]} (T), got {queries}")
    if impl == AUTO:
        is_compiling = torch.compiler.is_compiling()
        args = (tokens, states, layers, heads)
        impl = _TORCH if is_compiling else resolve("side_layers", impl, args).name
    if impl == _TORCH:
        return _by_torch(tokens, states, layers, heads, queries, eps)
    if states is None:
        states = tokens.new_empty((len(layers), len(tokens), 0, tokens.shape[2]))
    weights = [weight for layer in layers for weight in layer]
    states = states.to(tokens.dtype)
    settings = (heads, queries, eps, products == "bfloat16")
    if impl == _NATIVE and not is_watched(tokens, states, *weights):
        return side_layers_directly(tokens, states, weights, settings)
    out, _ = _library.ops.side_layers(tokens, states, weights, *settings, impl)
    last: Tensor = out
    return last


def _check(
    tokens: Tensor,
    states: Tensor | None,
    layers: Sequence[SideWeights],
    heads: int,
    products: str,
) -> None:
    check_axes("tokens", tokens, "B T S")
    check_dtype("tokens", tokens, FLOAT_DTYPES)
    batch, _, width = tokens.shape
    if not layers:
        raise ValueError("layers must hold the weights of at least one layer, got none")
    if states is not None:
        check_axes("states", states, "L B P S")
        expected = (len(layers), batch, states.shape[2], width)
        check_shape("states", states, expected, "by its own P, the layers, and tokens' B, S")
        check_dtype("states", states, FLOAT_DTYPES)
        check_same_device("states", states, "tokens", tokens)
    for number, layer in enumerate(layers):
        _check_layer(number, layer, layers[0].fc1.shape[0], tokens)
    if heads < 1 or width % heads:
        raise ValueError(f"heads must divide tokens' S, {width}, got {heads}")
    if products not in _PRODUCTS:
        raise ValueError(f"products must be one of {', '.join(_PRODUCTS)}, got {products!r}")


def _check_layer(number: int, layer: SideWeights, hidden: int, tokens: Tensor) -> None:
    width, dtype, device = tokens.shape[2], tokens.dtype, tokens.device
    vector, square = (width,), (width, width)
    wide, narrow = (hidden, width), (width, hidden)
    shapes = (vector, vector, (3 * width, width), (3 * width,), square, vector)
    for field, weight, shape in zip(
        layer._fields,
        layer,
        (*shapes, vector, vector, wide, (hidden,), narrow, vector),
        strict=True,
    ):
        # Named only where it is wrong: this is done in every step.
        if (weight.shape, weight.dtype, weight.device) == (shape, dtype, device):
            continue
        name = f"layers[{number}].{field}"
        check_shape(name, weight, shape, "by tokens' S and the first layer's fc1")
        check_dtype(name, weight, (tokens.dtype,))
        check_same_device(name, weight, "tokens", tokens)


def _by_torch(
    tokens: Tensor,
    states: Tensor | None,
    layers: Sequence[SideWeights],
    heads: int,
    queries: int,
    eps: float,
) -> Tensor:
    for number, weights in enumerate(layers):
        prompts = None if states is None else states[number]
        count = queries if number + 1 == len(layers) else tokens.shape[1]
        tokens = _block(tokens, prompts, weights, heads, count, eps)
    return tokens


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
