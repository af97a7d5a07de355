"""The one form in which every supported frozen model runs: a pre-norm vision transformer.

The adapters (``timm_modules.py``, ``huggingface.py``) bring each source into this form; what
cannot be brought into it is refused there.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_fast.backbone.linear_maps import add_linear, add_mlp, apply_linear
from fpt_fast.backbone.positions import PositionInterpolation, interpolate_positions

# Rows (tokens of all images) of an MLP that run at once.  Bounds the hidden activations, the
# largest ones of the pass, to 50 MB in f32 for a ViT-B; a GPU wants fewer and larger launches.
CHUNK_ROWS = {"cpu": 4096, "cuda": 65536}


class Embedding(nn.Module):
    """Pixels to tokens: patch projection, class and register tokens, positions, optional norm.

    ``prefix`` [1, R, C]: class token first.  ``position`` [1, r + h0·w0, C] belongs to the first
    ``r`` prefix tokens and to the patches of ``grid`` (h0, w0).
    """

    def __init__(
        self,
        projection: nn.Conv2d,
        patch_norm: nn.Module,
        prefix: Tensor,
        position: Tensor | None,
        grid: tuple[int, int],
        norm: nn.Module,
    ) -> None:
        super().__init__()
        self.projection = projection
        self.patch_norm = patch_norm
        self.prefix = nn.Parameter(prefix, requires_grad=False)
        self.position = None if position is None else nn.Parameter(position, requires_grad=False)
        self.grid = grid
        self.norm = norm
        self._cache: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def forward(self, pixels: Tensor, interpolation: PositionInterpolation) -> Tensor:
        """[B, 3, h, w] to [B, N, C]; the patch size must divide h and w."""
        patches = self.projection(pixels)  # [B, C, rows, columns]
        grid = (patches.shape[2], patches.shape[3])
        patches = self.patch_norm(patches.flatten(2).transpose(1, 2))
        prefix, position = self._offsets(grid, interpolation, patches.dtype)
        tokens = torch.cat([prefix.expand(patches.shape[0], -1, -1), patches + position], 1)
        return self.norm(tokens)  # type: ignore[no-any-return]

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to ``device`` and compute in ``dtype``; positions stay exact until interpolated."""
        self._cache.clear()
        exact = {name: p.detach() for name, p in self.named_parameters(recurse=False)}
        self.to(device=device, dtype=dtype)
        for name, value in exact.items():
            getattr(self, name).data = value.to(device)

    def _offsets(
        self, grid: tuple[int, int], interpolation: PositionInterpolation, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Prefix tokens with their positions [1, R, C]; positions of the patches of ``grid``."""
        if any(p.requires_grad for p in self.parameters(recurse=False)):
            # They are trained: others after the next step, and this step needs their gradient.
            return self._make_offsets(grid, interpolation, dtype)
        key = (grid, interpolation, dtype, self.prefix.device)
        if key not in self._cache:
            if len(self._cache) >= 8:  # sizes vary at evaluation; bound what they can pin
                self._cache.clear()
            self._cache[key] = self._make_offsets(grid, interpolation, dtype)
        return self._cache[key]

    def _make_offsets(
        self, grid: tuple[int, int], interpolation: PositionInterpolation, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        prefix, position = self.prefix.float(), _zero_position(self.prefix)
        if self.position is not None:
            count = self.position.shape[1] - self.grid[0] * self.grid[1]
            prefix = prefix.clone()
            prefix[:, :count] += self.position[:, :count].float()
            position = interpolate_positions(
                self.position[:, count:], self.grid, grid, interpolation
            )
        return prefix.to(dtype), position.to(dtype)


def _zero_position(like: Tensor) -> Tensor:
    """The position of a model without positions: zero, broadcast over all patches."""
    return torch.zeros((1, 1, like.shape[-1]), device=like.device)


class FrozenBlock(nn.Module):
    """One pre-norm block: ``x + scale1(attention(norm1(x)))``, then ``x + scale2(mlp(norm2(x)))``.

    Split where the method looks in: ``project`` gives what it keeps, ``complete`` the rest.
    """

    def __init__(
        self,
        num_heads: int,
        norm1: nn.Module,
        qkv: nn.Linear,
        proj: nn.Linear,
        norm2: nn.Module,
        mlp: nn.Module,
        *,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        attention_norm: nn.Module | None = None,
        scale1: nn.Module | None = None,
        scale2: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = norm1
        self.qkv = qkv
        self.q_norm = q_norm or nn.Identity()
        self.k_norm = k_norm or nn.Identity()
        self.attention_norm = attention_norm or nn.Identity()
        self.proj = proj
        self.scale1 = scale1 or nn.Identity()
        self.norm2 = norm2
        self.mlp = mlp
        self.scale2 = scale2 or nn.Identity()

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` [B, N, C] to q, k, v [B, H, N, D]: views of one buffer where no q/k norm is."""
        qkv = apply_linear(self.qkv, self.norm1(x))
        heads = qkv.view(*x.shape[:2], 3, self.num_heads, -1)  # [B, N, 3, H, D]
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def merge(self, attended: Tensor) -> Tensor:
        """Output of the attention module [B, N, C] from ``attended`` [B, H, N, D]."""
        return self.proj(self._merge_heads(attended))  # type: ignore[no-any-return]

    def complete(self, x: Tensor, attended: Tensor, chunk_rows: int | None = None) -> Tensor:
        """The block's output [B, N, C] from its input ``x`` and ``attended`` [B, H, N, D].

        Works on chunks of tokens, ``chunk_rows`` rows of all images together at a time, so that
        the hidden layer of the MLP never exists for all tokens of a large image.
        """
        rows = chunk_rows or CHUNK_ROWS.get(x.device.type, CHUNK_ROWS["cuda"])
        chunks = math.ceil(x.shape[1] / max(1, rows // x.shape[0]))
        if chunks <= 1:
            return self._complete(x, attended)
        tokens = math.ceil(x.shape[1] / chunks)  # of equal size: one odd token is no chunk
        out = torch.empty_like(x)
        for start in range(0, x.shape[1], tokens):
            part = slice(start, start + tokens)
            out[:, part] = self._complete(x[:, part], attended[:, :, part])
        return out

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, C] to [B, N, C], the whole block."""
        return self.complete(x, F.scaled_dot_product_attention(*self.project(x)))

    def _complete(self, x: Tensor, attended: Tensor) -> Tensor:
        x = add_linear(x, self.proj, self._merge_heads(attended), self.scale1)
        return add_mlp(x, self.mlp, self.norm2(x), self.scale2)

    def _merge_heads(self, attended: Tensor) -> Tensor:
        return self.attention_norm(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class FrozenVit(nn.Module):
    """Embedding, blocks, final norm; ``pooled_norm`` is the norm of models that pool first."""

    def __init__(
        self,
        embedding: Embedding,
        blocks: Sequence[FrozenBlock],
        norm: nn.Module,
        pooled_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.blocks = nn.ModuleList(blocks)
        self.norm = norm
        self.pooled_norm = pooled_norm or nn.Identity()

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Freeze, set to eval mode, move to ``device``, convert the weights to ``dtype`` once."""
        self.eval().requires_grad_(False)
        self.embedding.place(device, dtype)
        for module in (self.blocks, self.norm, self.pooled_norm):
            module.to(device=device, dtype=dtype)

    def block(self, index: int) -> FrozenBlock:
        """Block ``index``, typed."""
        return cast(FrozenBlock, self.blocks[index])
