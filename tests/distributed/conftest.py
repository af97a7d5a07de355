"""The small run of the pipeline's tests, for ranks."""

from pipeline.conftest import backbone, data, preload_settings, train_settings

__all__ = ["backbone", "data", "preload_settings", "train_settings"]
