"""The published augmentation by torchvision's own functions on the full image: the oracle."""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from fpt_fast.images import AugmentationDraw


def make_image(kind: str, height: int = 90, width: int = 120) -> Tensor:
    """``bright`` and ``dark`` reach the ends of the range, so that jitter clamps; ``mid`` not."""
    rng = np.random.default_rng(0)
    low, high = {"mid": (90, 160), "bright": (120, 256), "dark": (0, 90), "full": (0, 256)}[kind]
    blocks = rng.integers(low, high, (height // 6, width // 6, 3)).repeat(6, 0).repeat(6, 1)
    return torch.from_numpy(blocks.astype(np.uint8)).permute(2, 0, 1)


def in_published_order(image: Tensor, draw: AugmentationDraw, size: tuple[int, int]) -> Tensor:
    """Jitter, crop and resize, flip, each by torchvision on the full image, in f64.

    The crop is that of the unflipped image, which is where ``draw`` has it.
    """
    out = vision.to_dtype(image, torch.float64, scale=True)
    steps = [
        lambda x: vision.adjust_brightness(x, draw.brightness),
        lambda x: vision.adjust_contrast(x, draw.contrast),
    ]
    for step in steps[:: -1 if draw.contrast_first else 1]:
        out = step(out)
    out = vision.resized_crop(out, *draw.crop, list(size), antialias=True)
    out = vision.horizontal_flip(out) if draw.flip_horizontally else out
    return vision.vertical_flip(out) if draw.flip_vertically else out
