"""The methods that the papers compare FPT with, each on any frozen model that FPT takes."""

from fpt_fast.peers.config import LEARNING_RATES, PeerConfig
from fpt_fast.peers.create import create_peer
from fpt_fast.peers.model import PEER_FORMAT, BackboneSource, PeerModel
from fpt_fast.peers.registry import PEERS

__all__ = [
    "LEARNING_RATES",
    "PEERS",
    "PEER_FORMAT",
    "BackboneSource",
    "PeerConfig",
    "PeerModel",
    "create_peer",
]
