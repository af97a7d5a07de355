"""The vision transformer that a peer changes: the frozen model's own layers, with gradients."""

import copy
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fpt_fast.backbone import FrozenBackbone
from fpt_fast.backbone.vit import FrozenBlock
from fpt_fast.config import ConfigError
from fpt_fast.peers.config import PeerConfig


class TokenEdit(Protocol):
    """Puts tokens of its own among those of the model (prompts), and takes them out again."""

    def insert(self, x: Tensor, layer: int) -> Tensor:
        """Tokens [B, N, C] that leave the layer before to those that ``layer`` is given."""
        ...

    def remove(self, x: Tensor) -> Tensor:
        """Tokens that leave the last layer to the model's own, [B, N, C]."""
        ...


class Encoder(nn.Module):
    """Pixels [B, 3, h, w] to one vector an image [B, C], as ``FrozenBackbone.features`` makes it.

    ``vit`` holds a copy of the backbone's layers, without gradients until a method asks for them;
    a method may put modules in their places.  ``edit`` changes the tokens in front of each layer.
    """

    def __init__(self, backbone: FrozenBackbone, config: PeerConfig) -> None:
        super().__init__()
        self.spec = backbone.spec
        self.width = backbone.spec.hidden_size
        if backbone.dtype != torch.float32:
            raise ConfigError(
                f"a peer trains from weights in float32, and {backbone.spec.name} was loaded in "
                f"{backbone.dtype}; load it with dtype='float32', and use mixed_precision=True to "
                "multiply in bf16"
            )
        self.vit = copy.deepcopy(backbone.vit)
        self.interpolation = config.position_interpolation
        self.checkpointing = config.gradient_checkpointing
        self.plain_attention = config.attention == "plain"
        self.edit: TokenEdit | None = None

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, h, w] to [B, C]; the patch size must divide h and w."""
        x = self.embed(pixels)
        for index in range(self.spec.depth):
            if self.edit is not None:
                x = self.edit.insert(x, index)
            x = self.run_block(self.vit.block(index), x)
        return self.pool(x if self.edit is None else self.edit.remove(x))

    def embed(self, pixels: Tensor) -> Tensor:
        """Tokens in front of the first layer [B, N, C]."""
        # In f32 always: all layers add to these tokens, and in bf16 the sums would lose bits.
        with torch.autocast(pixels.device.type, enabled=False):
            x: Tensor = self.vit.embedding(pixels, self.interpolation)
        return x

    def run_block(self, block: FrozenBlock, x: Tensor) -> Tensor:
        """One layer, [B, N, C] to [B, N, C]."""
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(self._block, block, x, use_reentrant=False)
            return out
        return self._block(block, x)

    def pool(self, x: Tensor) -> Tensor:
        """Tokens behind the last layer [B, N, C] to the class token, or the patches' mean, [B, C]
        behind the model's final norm."""
        first = 0 if self.spec.has_class_token else self.spec.prefix_tokens
        used = slice(first, 1 if self.spec.has_class_token else None)
        return cast(Tensor, self.vit.pooled_norm(self.vit.norm(x[:, used]).mean(1)))

    def _block(self, block: FrozenBlock, x: Tensor) -> Tensor:
        q, k, v = block.project(x)
        if self.plain_attention:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            attended = scores.softmax(-1) @ v
        else:
            attended = F.scaled_dot_product_attention(q, k, v)
        # In one piece: chunks, which bound a pass without gradients, would all be kept here.
        return block.complete(x, attended, chunk_rows=x.shape[0] * x.shape[1])
