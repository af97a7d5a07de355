"""Where the features are during training: in GPU memory, in pinned memory, or on the disk."""

from fpt_fast.tiers.choice import (
    FeaturesOn,
    Placement,
    Sizes,
    SplitSize,
    Tier,
    choose_tiers,
    device_room,
    gigabytes,
)
from fpt_fast.tiers.sources import ReadFeatures, StoredFeatures, free_host_bytes, record_bytes
from fpt_fast.tiers.staging import Staging
from fpt_fast.tiers.streams import CudaStreams, Mark, Streams

__all__ = [
    "CudaStreams",
    "FeaturesOn",
    "Mark",
    "Placement",
    "ReadFeatures",
    "Sizes",
    "SplitSize",
    "Staging",
    "StoredFeatures",
    "Streams",
    "Tier",
    "choose_tiers",
    "device_room",
    "free_host_bytes",
    "gigabytes",
    "record_bytes",
]
