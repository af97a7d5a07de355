"""Visual prompt tuning (Jia et al., ECCV 2022): learned tokens beside those of the image.

``deep``: tokens of its own in front of every layer, in the places of those before; ``shallow``:
in front of the first layer only.  They stand behind the class token, as published.
"""

import math

import torch
from torch import Tensor, nn

from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder


class Prompts(nn.Module):
    """``tokens`` [layers, P, C], uniform within sqrt(6 / (patch values + C)) at first."""

    def __init__(self, layers: int, count: int, width: int, patch_values: int, prefix: int) -> None:
        super().__init__()
        bound = math.sqrt(6.0 / (patch_values + width))
        self.tokens = nn.Parameter(torch.empty(layers, count, width).uniform_(-bound, bound))
        self.prefix = prefix

    def insert(self, x: Tensor, layer: int) -> Tensor:
        """[B, N, C] or, behind the first layer, [B, N + P, C], to [B, N + P, C]."""
        layers, count, _ = self.tokens.shape
        if layer >= layers:
            return x
        new = self.tokens[layer].to(x.dtype).expand(len(x), -1, -1)
        rest = self.prefix if layer == 0 else self.prefix + count
        return torch.cat([x[:, : self.prefix], new, x[:, rest:]], 1)

    def remove(self, x: Tensor) -> Tensor:
        """[B, N + P, C] to [B, N, C]."""
        return torch.cat([x[:, : self.prefix], x[:, self.prefix + self.tokens.shape[1] :]], 1)


def apply(encoder: Encoder, config: PeerConfig) -> nn.Module:
    """Train the prompts."""
    spec = encoder.spec
    encoder.edit = Prompts(
        spec.depth if config.prompt_depth == "deep" else 1,
        config.num_prompts,
        spec.hidden_size,
        3 * spec.patch_size[0] * spec.patch_size[1],
        spec.prefix_tokens,
    )
    return encoder
