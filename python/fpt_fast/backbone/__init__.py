"""The frozen vision transformer: load one, and read the queries, keys and values of its layers."""

from fpt_fast.backbone.dtype import choose_dtype
from fpt_fast.backbone.errors import BackboneError
from fpt_fast.backbone.frozen import FrozenBackbone
from fpt_fast.backbone.load import backbone_name, load_backbone
from fpt_fast.backbone.positions import PositionInterpolation

__all__ = [
    "BackboneError",
    "FrozenBackbone",
    "PositionInterpolation",
    "backbone_name",
    "choose_dtype",
    "load_backbone",
]
