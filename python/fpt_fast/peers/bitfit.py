"""BitFit (Ben Zaken et al., ACL 2022): the biases alone move."""

from torch import nn

from fpt_fast.config import ConfigError
from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder


def apply(encoder: Encoder, config: PeerConfig) -> nn.Module:
    """Train every bias: of the linear layers, of the norms and of the patch projection."""
    biases = [p for name, p in encoder.vit.named_parameters() if name.split(".")[-1] == "bias"]
    if not biases:
        raise ConfigError(
            f"method='bitfit' trains biases, and {encoder.spec.name} has none; choose another "
            "method"
        )
    for bias in biases:
        bias.requires_grad_(True)
    return encoder
