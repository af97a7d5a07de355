"""Streams of random numbers that must never be the same numbers."""

import torch

from fpt_fast.images import mix

ORDER_STREAM, SIDE_STREAM, FROZEN_STREAM = 1, 2, 3


def stream_generator(seed: int, stream: int) -> torch.Generator:
    """A generator of its own for each pair of ``seed`` and ``stream``."""
    return torch.Generator().manual_seed(mix(seed, stream))
