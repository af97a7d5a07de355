"""Adapters (Houlsby et al., ICML 2019): two narrow layers behind each attention and each MLP, or
behind the MLPs alone."""

import torch
from torch import Tensor, nn

from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder


class Adapter(nn.Module):
    """``x + up(gelu(down(x)))``, nearly ``x`` at first: weights truncated normal 0.01, biases 0."""

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.up = nn.Linear(bottleneck, width)
        for layer in (self.down, self.up):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] to [..., C]."""
        out: Tensor = x + self.up(torch.nn.functional.gelu(self.down(x)))
        return out


def apply(encoder: Encoder, config: PeerConfig) -> nn.Module:
    """Train the adapters of each layer, each in front of the addition to the residual stream.

    The norms stay as they are: the published share is reached without them.
    """
    places = ("proj", "mlp") if config.adapter_places == "both" else ("mlp",)
    for index in range(encoder.spec.depth):
        block = encoder.vit.block(index)
        for name in places:
            adapted = nn.Sequential(getattr(block, name), Adapter(encoder.width, config.bottleneck))
            setattr(block, name, adapted)
    return encoder
