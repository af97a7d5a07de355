"""Attention tuning (Touvron et al., ECCV 2022): the weights of self-attention alone move."""

from torch import nn

from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder


def apply(encoder: Encoder, config: PeerConfig) -> nn.Module:
    """Train projections to query, key and value and back, with their biases, in every layer."""
    for index in range(encoder.spec.depth):
        block = encoder.vit.block(index)
        block.qkv.requires_grad_(True)
        block.proj.requires_grad_(True)
    return encoder
