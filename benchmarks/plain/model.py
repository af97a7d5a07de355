"""The published fusion and side network in plain f32 PyTorch: nothing fused, nothing left out.

Written from the method's description: prompts expanded over the batch, explicit softmax maps with
gradients to keys and values where autograd wants them, three projections per attention, and a
last layer that computes every token although the head reads one.  Parameter names are those of
the published weights.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class PlainSizes:
    """Widths and counts; ``C`` frozen and ``S`` side width, ``prompt_dim`` one of the two."""

    layers: int
    frozen_width: int
    side_width: int
    heads: int
    prompts: int
    prompt_dim: int
    patch: int
    side_size: int
    outputs: int


class PlainFpt(nn.Module):
    """Fusion module and side network; ``forward`` gives logits [B, outputs]."""

    def __init__(self, sizes: PlainSizes) -> None:
        super().__init__()
        self.side_encoder = PlainSide(sizes)
        self.fusion_module = PlainFusion(sizes)

    def forward(self, pixels: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """``pixels`` [B, 3, h, w]; ``keys``, ``values`` [L, B, H, K, D] f32."""
        return self.side_encoder(pixels, self.fusion_module(keys, values))


class PlainFusion(nn.Module):
    """Prompts attend to the kept tokens of every layer."""

    def __init__(self, sizes: PlainSizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.wide = sizes.prompt_dim == sizes.frozen_width
        self.prompts = nn.Parameter(torch.empty(sizes.layers, 1, sizes.prompts, sizes.prompt_dim))
        nn.init.normal_(self.prompts, std=1e-6)
        if self.wide:
            self.layer_norm = nn.LayerNorm(sizes.prompt_dim)
        else:
            self.prompt_proj = nn.Linear(sizes.prompt_dim, sizes.frozen_width)
        self.out_proj = nn.Linear(sizes.frozen_width, sizes.side_width)
        self.dropout = nn.Dropout(0.5)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """States [L, B, P, S]."""
        prompts = self.prompts.expand(-1, keys.shape[1], -1, -1)  # [L, B, P, prompt_dim]
        queries = self.layer_norm(prompts) if self.wide else self.prompt_proj(prompts)
        queries = queries.unflatten(-1, (self.heads, -1)).transpose(2, 3)  # [L, B, H, P, D]
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(keys.shape[-1])
        out = (scores.softmax(dim=-1) @ values).transpose(2, 3).flatten(3)  # [L, B, P, C]
        states = self.out_proj(out + prompts) if self.wide else self.out_proj(out) + prompts
        return self.dropout(states)


class _Named(nn.Module):
    """A module that holds others under the names of the published weights."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class PlainLayer(nn.Module):
    """Pre-norm transformer layer over all tokens and prompts."""

    def __init__(self, sizes: PlainSizes) -> None:
        super().__init__()
        width = sizes.side_width
        self.heads = sizes.heads
        projections = {name: nn.Linear(width, width) for name in ("query", "key", "value")}
        self.attention = _Named(
            attention=_Named(**projections), output=_Named(dense=nn.Linear(width, width))
        )
        self.intermediate = _Named(dense=nn.Linear(width, 4 * width))
        self.output = _Named(dense=nn.Linear(4 * width, width))
        self.layernorm_before = nn.LayerNorm(width, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T + P, S] to the same."""
        normed = self.layernorm_before(x)
        own = self.attention.attention
        q, k, v = (
            projection(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (own.query, own.key, own.value)
        )
        probabilities = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        attended = (probabilities @ v).transpose(1, 2).flatten(2)
        x = x + self.attention.output.dense(attended)
        hidden = F.gelu(self.intermediate.dense(self.layernorm_after(x)))
        return x + self.output.dense(hidden)


class PlainSide(nn.Module):
    """The side network; every layer sees its prompts, which are cut off after it."""

    def __init__(self, sizes: PlainSizes) -> None:
        super().__init__()
        width, tokens = sizes.side_width, (sizes.side_size // sizes.patch) ** 2 + 1
        embeddings = _Named(
            patch_embeddings=_Named(
                projection=nn.Conv2d(3, width, kernel_size=sizes.patch, stride=sizes.patch)
            )
        )
        embeddings.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        embeddings.position_embeddings = nn.Parameter(torch.zeros(1, tokens, width))
        self.vit = _Named(
            embeddings=embeddings,
            encoder=_Named(layer=nn.ModuleList(PlainLayer(sizes) for _ in range(sizes.layers))),
            layernorm=nn.LayerNorm(width, eps=1e-12),
        )
        self.classifier = nn.Linear(width, sizes.outputs)

    def forward(self, pixels: Tensor, states: Tensor) -> Tensor:
        """Logits [B, outputs] of ``pixels`` [B, 3, h, w] and ``states`` [L, B, P, S]."""
        embeddings = self.vit.embeddings
        patches = embeddings.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2)
        class_token = embeddings.cls_token.expand(len(pixels), -1, -1)
        x = torch.cat((class_token, patches), dim=1) + embeddings.position_embeddings
        for layer, prompts in zip(self.vit.encoder.layer, states, strict=True):
            x = layer(torch.cat((x, prompts), dim=1))[:, : x.shape[1]]
        return self.classifier(self.vit.layernorm(x)[:, 0])
