"""Attention of prompts in chunks: a few layers of one image, converted, used and overwritten.

No f32 copy of the features ever exists, dK and dV are never formed, and every sum runs in a
fixed order.
"""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from fpt_fast.ops.reference import Scales

# Keys and values of one chunk, converted: they should stay in the second-level cache.
_CHUNK_BYTES = 2 << 20


class TokenSource(Protocol):
    """Where the kept tokens of an image come from."""

    images: int
    kept: int

    def load(self, image: int, layers: slice, keys: Tensor, values: Tensor) -> None:
        """Write keys and values, both [G, H, K, D], without their scales."""

    def scales(self, image: int, layers: slice) -> tuple[Tensor, Tensor] | None:
        """Scales [G * H, 1, D] of the keys' channels and [G * H, 1, K] of the values' tokens."""


class StoredTokens:
    """Tokens of a store kv [M, L, 2, H, K, D], of whose images ``rows`` picks some."""

    def __init__(self, kv: Tensor, rows: Tensor | None, scales: Scales | None) -> None:
        self._kv = kv
        self._rows = list(range(kv.shape[0])) if rows is None else rows.tolist()
        self._scales = scales
        self.images = len(self._rows)
        self.kept = kv.shape[4]

    def load(self, image: int, layers: slice, keys: Tensor, values: Tensor) -> None:
        """Convert the image's part of the store."""
        kv = self._kv[self._rows[image], layers]  # [G, 2, H, K, D]
        keys.copy_(kv[:, 0])
        values.copy_(kv[:, 1])

    def scales(self, image: int, layers: slice) -> tuple[Tensor, Tensor] | None:
        """The image's scales, None where tokens are stored as they are."""
        if self._scales is None:
            return None
        k_scales, v_scales = (s[self._rows[image], layers] for s in self._scales)
        return k_scales.flatten(0, 1).unsqueeze(1), v_scales.flatten(0, 1).unsqueeze(1)


class IndexedTokens:
    """Tokens ``index`` [B, L, H, K] of a frozen model's own k, v [L, B, H, N, D]."""

    def __init__(self, k: Tensor, v: Tensor, index: Tensor) -> None:
        self._k, self._v = k, v
        self._index = index.long()
        self._head = torch.arange(k.shape[2]).unsqueeze(1)  # [H, 1]
        self.images, self.kept = k.shape[1], index.shape[3]

    def load(self, image: int, layers: slice, keys: Tensor, values: Tensor) -> None:
        """Gather the image's tokens, layer by layer."""
        for slot, layer in enumerate(range(layers.start, layers.stop)):
            at = (self._head, self._index[image, layer])
            keys[slot] = self._k[layer, image][at]
            values[slot] = self._v[layer, image][at]

    def scales(self, image: int, layers: slice) -> None:
        """A frozen model's own tokens carry no scales."""


def forward(q: Tensor, source: TokenSource) -> tuple[Tensor, Tensor]:
    """Output [L, B, P, C] of q's dtype and log-sum-exp [L, B, H, P] for q [L, H, P, D]."""
    layers, heads, prompts, width = q.shape
    queries = q.to(_wide(q))
    out = q.new_empty((layers, source.images, prompts, heads * width))
    lse = queries.new_empty((layers, source.images, heads, prompts))
    for image, group, keys, values in _chunks(queries, source):
        scales = source.scales(image, group)
        weights = _logits(queries[group], keys, scales)  # [G * H, P, K]
        top = weights.amax(dim=-1, keepdim=True)
        weights.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        if scales is not None:
            weights.mul_(scales[1])
        attended = torch.bmm(weights, values).div_(total)  # [G * H, P, D]
        out[group, image] = _merge_heads(attended, heads)
        lse[group, image] = top.add_(total.log()).view(-1, heads, prompts)
    return out, lse


def backward(grad: Tensor, q: Tensor, lse: Tensor, source: TokenSource) -> Tensor:
    """Gradient to q [L, H, P, D] for grad [L, B, P, C], summed over the images in their order."""
    heads, width = q.shape[1], q.shape[3]
    queries = q.to(_wide(q))
    grad_q = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    for image, group, keys, values in _chunks(queries, source):
        scales = source.scales(image, group)
        weights = _logits(queries[group], keys, scales)  # [G * H, P, K]
        weights.sub_(lse[group, image].flatten(0, 1).unsqueeze(-1)).exp_()
        # The rounding of a large lse would be a factor on every weight of its row, which peaked
        # attention, where the gradient is a difference of nearly equal terms, cannot bear.
        weights.div_(weights.sum(dim=-1, keepdim=True))
        grad_out = _split_heads(grad[group, image].to(queries.dtype), heads)  # [G * H, P, D]
        grad_logits = torch.bmm(grad_out, values.transpose(1, 2))
        if scales is not None:
            grad_logits.mul_(scales[1])
        # Not the sum of grad * out, which is equal but for the rounding of a 16-bit out.
        mean = (weights * grad_logits).sum(dim=-1, keepdim=True)
        grad_logits.sub_(mean).mul_(weights)
        part = torch.bmm(grad_logits, keys)
        if scales is not None:
            part.mul_(scales[0])
        grad_q[group].flatten(0, 1).add_(part, alpha=width**-0.5)
    return grad_q.to(q.dtype)


def _chunks(queries: Tensor, source: TokenSource) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """Every image with every group of layers, its keys and its values [G * H, K, D].

    Keys and values are scratch, valid until the next chunk.
    """
    layers, heads, _, width = queries.shape
    layer_bytes = 2 * heads * source.kept * width * queries.element_size()
    size = max(1, min(layers, _CHUNK_BYTES // layer_bytes))
    scratch = queries.new_empty((2, size, heads, source.kept, width))
    for image in range(source.images):
        for first in range(0, layers, size):
            group = slice(first, min(first + size, layers))
            keys, values = scratch[:, : group.stop - first].unbind()
            source.load(image, group, keys, values)
            yield image, group, keys.flatten(0, 1), values.flatten(0, 1)


def _logits(queries: Tensor, keys: Tensor, scales: tuple[Tensor, Tensor] | None) -> Tensor:
    """Scaled product [G * H, P, K] of queries [G, H, P, D] and keys [G * H, K, D]."""
    left = queries.flatten(0, 1)
    if scales is not None:
        left = left * scales[0]
    logits = left.new_empty((*left.shape[:2], keys.shape[1]))
    return torch.baddbmm(
        logits, left, keys.transpose(1, 2), beta=0, alpha=left.shape[-1] ** -0.5, out=logits
    )


def _merge_heads(attended: Tensor, heads: int) -> Tensor:
    """[G * H, P, D] -> [G, P, C]."""
    prompts, width = attended.shape[1:]
    return attended.view(-1, heads, prompts, width).transpose(1, 2).flatten(2)


def _split_heads(merged: Tensor, heads: int) -> Tensor:
    """[G, P, C] -> [G * H, P, D], contiguous."""
    layers, prompts, channels = merged.shape
    split = merged.reshape(layers, prompts, heads, channels // heads)
    return split.transpose(1, 2).flatten(0, 1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
