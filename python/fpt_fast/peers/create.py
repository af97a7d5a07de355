"""A peer by the name of its method and of its frozen model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.config import ConfigError
from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.model import PeerModel
from fpt_fast.peers.source import BackboneSource
from fpt_fast.records import BackboneSpec


def create_peer(
    method: str | PeerConfig,
    backbone: str | Path | FrozenBackbone | BackboneSpec,
    num_classes: int,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> PeerModel:
    """Make a peer to train; what ``create_model`` calls for the compared methods.

    A ``backbone`` by name is loaded with timm's published weights; one given as an object must be
    in float32.
    """
    base = {"method": method} if isinstance(method, str) else method.to_json()
    config = PeerConfig.from_json({**base, **(changes or {})})
    if isinstance(backbone, BackboneSpec):
        raise ConfigError(
            f"method={config.method!r} trains on a copy of the frozen model, so its description "
            "does not do; pass its name, its directory or the loaded backbone"
        )
    source = BackboneSource()
    if isinstance(backbone, str | Path):
        source = BackboneSource(str(backbone))
        backbone = load_backbone(
            backbone,
            dtype="float32",
            device="cpu",
            position_interpolation=config.position_interpolation,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PeerModel(config, backbone, num_classes, source=source)
