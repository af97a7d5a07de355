"""Linear probing: the frozen model's vector of an image, and a linear head on it."""

from torch import nn

from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder


def apply(encoder: Encoder, config: PeerConfig) -> nn.Module:
    """Train nothing here; the head is always trained."""
    return encoder
