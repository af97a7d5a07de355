"""Ladder side-tuning (Sung et al., NeurIPS 2022): a narrow network beside the frozen model.

Layer by layer it is given the frozen model's tokens, narrowed, mixed with its own by a learned
gate; no gradient runs through the frozen model.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpt_fast.backbone.vit import FrozenBlock
from fpt_fast.config import ConfigError
from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder

# The gates' temperature, as published.
_TEMPERATURE = 0.1


class LadderSide(nn.Module):
    """``encoder`` without gradients, and the ladder beside it: pixels [B, 3, h, w] to [B, C]."""

    def __init__(self, encoder: Encoder, width: int) -> None:
        super().__init__()
        spec = encoder.spec
        self.encoder = encoder
        self.narrow = nn.ModuleList(nn.Linear(encoder.width, width) for _ in range(spec.depth + 1))
        self.gates = nn.Parameter(torch.zeros(spec.depth))
        self.blocks = nn.ModuleList(_side_block(width, spec.num_heads) for _ in range(spec.depth))
        self.norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, encoder.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] to [B, C]."""
        spec = self.encoder.spec
        with torch.no_grad():
            x = self.encoder.embed(pixels)  # [B, N, C]
        own: Tensor = self.narrow[0](x)  # [B, N, S]
        gates = torch.sigmoid(self.gates / _TEMPERATURE)
        for index in range(spec.depth):
            with torch.no_grad():
                x = self.encoder.run_block(self.encoder.vit.block(index), x)
            own = gates[index] * self.narrow[index + 1](x) + (1 - gates[index]) * own
            own = self.encoder.run_block(self.block(index), own)
        tokens = own[:, :1] if spec.has_class_token else own[:, spec.prefix_tokens :]
        out: Tensor = self.widen(self.norm(tokens).mean(1))
        return out

    def block(self, index: int) -> FrozenBlock:
        """Side layer ``index``, typed."""
        return cast(FrozenBlock, self.blocks[index])


class SideMlp(nn.Module):
    """Four times as wide inside, exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = _linear(width, 4 * width)
        self.fc2 = _linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, S] to [B, N, S]."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


def apply(encoder: Encoder, config: PeerConfig) -> nn.Module:
    """Train the ladder: its layers begin as the frozen ones, pruned, or at random."""
    ladder = LadderSide(encoder, encoder.width // config.side_reduction)
    if config.side_init == "pruned":
        prune_into(ladder)
    return ladder


@torch.no_grad()
def prune_into(ladder: LadderSide) -> None:
    """Give each side layer the part of the frozen one's weights that is largest.

    One choice of channels for the whole residual stream, by the magnitude of what writes to them;
    of each head and each MLP the widest rows.  (Published: by Fisher information, which needs
    data; by magnitude is the paper's simpler form.)
    """
    encoder, width = ladder.encoder, ladder.widen.in_features
    depth = encoder.spec.depth
    blocks = [encoder.vit.block(index) for index in range(depth)]
    written = torch.stack(
        [_size(layer.weight, 1) for block in blocks for layer in (block.proj, _mlp(block)[1])]
    ).sum(0)
    channels = _largest(written, width)
    for index, block in enumerate(blocks):
        _prune_block(block, ladder.block(index), channels)
    _copy(ladder.norm, encoder.vit.norm, channels)


def _prune_block(block: FrozenBlock, side: FrozenBlock, channels: Tensor) -> None:
    heads, width = block.num_heads, block.proj.in_features
    kept = side.proj.in_features // heads
    sizes = _size(block.qkv.weight, 1).reshape(3, heads, width // heads)  # [3, H, D]
    scored = _per_head(sizes[0] + sizes[1], kept)  # [H * kept]: a query meets its key
    valued = _per_head(sizes[2], kept)
    rows = torch.cat([scored, scored + width, valued + 2 * width])
    (first, second), (side_first, side_second) = _mlp(block), _mlp(side)
    hidden = _largest(_size(first.weight, 1), side_first.out_features)
    _copy(side.norm1, block.norm1, channels)
    _copy(side.qkv, block.qkv, rows, channels)
    _copy(side.proj, block.proj, channels, valued)
    _copy(side.norm2, block.norm2, channels)
    _copy(side_first, first, hidden, channels)
    _copy(side_second, second, channels, hidden)


def _mlp(block: FrozenBlock) -> tuple[nn.Linear, nn.Linear]:
    """The two layers of a block's MLP."""
    first, second = getattr(block.mlp, "fc1", None), getattr(block.mlp, "fc2", None)
    if (
        isinstance(first, nn.Linear)
        and isinstance(second, nn.Linear)
        and first.out_features == second.in_features
    ):
        return first, second
    raise ConfigError(
        "side_init='pruned' needs an MLP of two linear layers, fc1 and fc2, in every layer, and "
        f"this model has a {type(block.mlp).__name__}; use side_init='random'"
    )


def _side_block(width: int, heads: int) -> FrozenBlock:
    return FrozenBlock(
        heads,
        nn.LayerNorm(width),
        _linear(width, 3 * width),
        _linear(width, width),
        nn.LayerNorm(width),
        SideMlp(width),
    )


def _linear(inputs: int, outputs: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.trunc_normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


def _size(weight: Tensor, axis: int) -> Tensor:
    return weight.abs().sum(axis)


def _largest(sizes: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest, ascending; on ties the lower ones."""
    return sizes.sort(descending=True, stable=True).indices[:count].sort().values


def _per_head(sizes: Tensor, count: int) -> Tensor:
    """Rows [H * count] of the ``count`` largest of each head, ``sizes`` [H, D]."""
    width = sizes.shape[1]
    return torch.cat([_largest(head, count) + i * width for i, head in enumerate(sizes)])


def _copy(to: nn.Module, source: nn.Module, rows: Tensor, columns: Tensor | None = None) -> None:
    """Weight and bias of ``source`` at ``rows`` (and ``columns``), where it has them."""
    for name in ("weight", "bias"):
        values = getattr(source, name, None)
        if values is not None:
            part = values[rows]
            if part.dim() == 2 and columns is not None:
                part = part[:, columns]
            getattr(to, name).copy_(part)
