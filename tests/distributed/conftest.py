"""The small run of the pipeline's tests, for ranks."""

from pipeline.conftest import (
    backbone,
    data,
    figures_are_drawn_only,
    preload_settings,
    train_settings,
)

__all__ = [
    "backbone",
    "data",
    "figures_are_drawn_only",
    "preload_settings",
    "train_settings",
]
