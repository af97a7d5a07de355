"""Batches for the trainer: from the feature cache, or from a frozen pass per batch.

All sources give the same ``FeatureBatch``, so that whoever trains cannot tell them apart.
"""

from fpt_fast.loader.batches import FeatureLoader, SweepLoader
from fpt_fast.loader.sources import (
    CachedFeatures,
    FeatureSource,
    FrozenPass,
    LiveFeatures,
    NoFeatures,
)

__all__ = [
    "CachedFeatures",
    "FeatureLoader",
    "FeatureSource",
    "FrozenPass",
    "LiveFeatures",
    "NoFeatures",
    "SweepLoader",
]
