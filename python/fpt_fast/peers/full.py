"""Full fine-tuning: every weight of the frozen model moves."""

from torch import nn

from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder


def apply(encoder: Encoder, config: PeerConfig) -> nn.Module:
    """Train everything that the forward pass reads."""
    return encoder.requires_grad_(True)
