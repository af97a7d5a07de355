"""The methods that the papers compare FPT with, each on any frozen model that FPT takes."""

from fpt_fast.peers.config import LEARNING_RATES, PeerConfig
from fpt_fast.peers.create import create_peer
from fpt_fast.peers.model import PEER_FORMAT, PeerModel
from fpt_fast.peers.registry import PEERS
from fpt_fast.peers.source import BackboneSource

__all__ = [
    "LEARNING_RATES",
    "PEERS",
    "PEER_FORMAT",
    "BackboneSource",
    "PeerConfig",
    "PeerModel",
    "create_peer",
]
