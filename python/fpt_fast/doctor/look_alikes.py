"""Pairs of images that look the same though their pixels differ: saved again, scaled, brightened.

Each thumbnail gives 256 bits, one for every pair of horizontal neighbours (dHash, Krawetz 2013).
Pairs of nearly equal bits whose thumbnails also correlate are look-alikes.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

# Of 256 bits; two unrelated pictures differ in about half.
_BITS_THAT_MAY_DIFFER = 12
_CORRELATION = 0.995
_BLOCK = 1024


def look_alike_pairs(thumbnails: Sequence[NDArray[np.float32]]) -> list[tuple[int, int]]:
    """Positions (i, j), i < j, of thumbnails [h, w] in [0, 1] that show the same picture.

    Time O(n²) in matrix products, memory O(n): a second for 10,000 images.
    """
    if len(thumbnails) < 2:
        return []
    stack = torch.from_numpy(np.stack(thumbnails))  # [n, h, w]
    signs = torch.where(stack[:, :, 1:] > stack[:, :, :-1], 1.0, -1.0).flatten(1)  # [n, bits]
    centred = stack.flatten(1) - stack.flatten(1).mean(1, keepdim=True)
    norms = centred.norm(dim=1, keepdim=True)
    unit = centred / norms.clamp_min(1e-12)  # flat pictures correlate with nothing
    least = signs.shape[1] - 2 * _BITS_THAT_MAY_DIFFER
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(stack), _BLOCK):
        rows = slice(start, start + _BLOCK)
        alike = (signs[rows] @ signs.T >= least) & (unit[rows] @ unit.T >= _CORRELATION)
        for i, j in alike.nonzero().tolist():
            if start + i < j:
                pairs.append((start + i, j))
    return pairs
