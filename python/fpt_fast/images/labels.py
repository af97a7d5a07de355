"""Labels of a data set's images as tensors, and how often a balanced epoch draws each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fpt_fast.records import ImageItem


def labels_of(items: Sequence[ImageItem]) -> Tensor:
    """[images] i64, or [images, findings] i64 of 1, 0 or -1 where images may have several, or
    [images] f64 where they have a number."""
    if items and items[0].value is not None:
        return torch.tensor([item.value for item in items], dtype=torch.float64)
    if items and items[0].findings:
        return torch.tensor([item.findings for item in items], dtype=torch.int64)
    return torch.tensor([item.label for item in items], dtype=torch.int64)


def sampling_weights(labels: Tensor) -> Tensor:
    """Weights [images] f64 by which each class is drawn alike often.

    Of findings, an image weighs as much as the rarest that it has; images without any are one
    class more.
    """
    if labels.dim() == 1:
        counts = torch.bincount(labels).double()
        return 1.0 / counts[labels]
    has = torch.cat([labels == 1, ~(labels == 1).any(dim=1, keepdim=True)], dim=1)
    weights = 1.0 / has.double().sum(dim=0).clamp(min=1.0)  # [findings + 1]
    return torch.where(has, weights, 0.0).amax(dim=1)
