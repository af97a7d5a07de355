"""The published frozen pass in plain f32 PyTorch: every map materialised, every layer selected.

Written from the method's description and read as its formulas: separate projections, the whole
softmax map of every layer, its mean over the queries, the best K tokens of every head of every
layer, extracted or not, and every layer computed to its end.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainLayer:
    """One layer's ``scores`` [B, H, N], ``index`` [B, H, K] (best first), ``keys``, ``values``
    [B, H, K, D]."""

    scores: Tensor
    index: Tensor
    keys: Tensor
    values: Tensor


class PlainFrozenVit(nn.Module):
    """A frozen ViT from its tensors in the Hugging Face layout, without the ``vit.`` prefix."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        num_heads: int,
        layer_norm_eps: float = 1e-12,
        token_ratio: float = 0.2,
        importance: str = "global",
    ) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.num_heads = num_heads
        self.eps = layer_norm_eps
        self.token_ratio = token_ratio
        self.importance = importance
        names = {name.split(".")[2] for name in weights if name.startswith("encoder.layer.")}
        self.depth = len(names)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> list[PlainLayer]:
        """``pixels`` [B, 3, h, w] f32 to what every layer keeps."""
        x = self._embed(pixels)
        layers = []
        for index in range(self.depth):
            x, kept = self._layer(x, f"encoder.layer.{index}")
            layers.append(kept)
        return layers

    def _embed(self, pixels: Tensor) -> Tensor:
        projection = "embeddings.patch_embeddings.projection"
        weight = self.weights[f"{projection}.weight"]
        patches = F.conv2d(
            pixels, weight, self.weights[f"{projection}.bias"], stride=weight.shape[2:]
        )
        rows, columns = patches.shape[2:]
        cls_token = self.weights["embeddings.cls_token"].expand(len(pixels), -1, -1)
        tokens = torch.cat([cls_token, patches.flatten(2).transpose(1, 2)], dim=1)
        return tokens + self._positions(rows, columns)

    def _positions(self, rows: int, columns: int) -> Tensor:
        positions = self.weights["embeddings.position_embeddings"]
        side = math.isqrt(positions.shape[1] - 1)
        if (rows, columns) == (side, side):
            return positions
        grid = positions[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
        scale = ((rows + 0.1) / side, (columns + 0.1) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
        return torch.cat([positions[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)

    def _layer(self, x: Tensor, name: str) -> tuple[Tensor, PlainLayer]:
        normed = self._norm(x, f"{name}.layernorm_before")
        query, key, value = (
            self._heads(self._linear(normed, f"{name}.attention.attention.{part}"))
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        attention = scores.softmax(dim=-1)  # [B, H, N, N]
        kept = self._select(attention, key, value)
        context = (attention @ value).transpose(1, 2).flatten(2)
        x = x + self._linear(context, f"{name}.attention.output.dense")
        hidden = self._linear(
            self._norm(x, f"{name}.layernorm_after"), f"{name}.intermediate.dense"
        )
        return x + self._linear(F.gelu(hidden), f"{name}.output.dense"), kept

    def _select(self, attention: Tensor, key: Tensor, value: Tensor) -> PlainLayer:
        importance = attention.mean(dim=2) if self.importance == "global" else attention[:, :, 0]
        keep = int(self.token_ratio * importance.shape[-1])
        index = importance.topk(keep, dim=-1).indices
        where = index[..., None].expand(-1, -1, -1, key.shape[-1])
        return PlainLayer(importance, index, key.gather(2, where), value.gather(2, where))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.eps)
