"""Position embeddings for a grid of patches other than the one they were trained on."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from fpt_fast.backbone.errors import BackboneError

PositionInterpolation = Literal["timm", "bicubic_scale"]
POSITION_INTERPOLATIONS: tuple[PositionInterpolation, ...] = ("timm", "bicubic_scale")


def interpolate_positions(
    position: Tensor, old: tuple[int, int], new: tuple[int, int], mode: PositionInterpolation
) -> Tensor:
    """Resample patch positions [1, h0·w0, C] of grid ``old`` to [1, h·w, C] of grid ``new``, f32.

    ``"timm"`` is what timm does for dynamic image sizes: bicubic with antialiasing.
    ``"bicubic_scale"`` is what the authors' code inherited from transformers 4.29: bicubic
    without antialiasing, by a scale of (h + 0.1) / h0, which shifts the sampling points a
    little; kept for parity with published weights and features.
    """
    if old == new:
        return position.float()
    image = position.float().reshape(1, *old, -1).permute(0, 3, 1, 2)  # [1, C, h0, w0]
    if mode == "timm":
        image = F.interpolate(image, size=new, mode="bicubic", antialias=True)
    else:
        scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
        image = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
        if tuple(image.shape[-2:]) != new:
            raise BackboneError(
                f"position_interpolation='bicubic_scale' cannot turn a grid of {old} patches "
                f"into {new}: rounding gives {tuple(image.shape[-2:])}; use 'timm' for this size"
            )
    return image.permute(0, 2, 3, 1).flatten(1, 2)
