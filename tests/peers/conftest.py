"""A peer's run, small enough to train in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pipeline.conftest import figures_are_drawn_only
from small_run import write_backbone

from fpt_fast.pipeline import TrainSettings
from helpers import write_image_set

__all__ = ["figures_are_drawn_only", "peer_settings"]


@pytest.fixture
def peer_settings(tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a one-epoch run on 24 images of 3 classes; keyword arguments change them."""
    backbone = write_backbone(tmp_path / "golden-vit")
    data = write_image_set(tmp_path / "images")

    def make(method: str, **changes: Any) -> TrainSettings:
        values: dict[str, Any] = {
            "method": method,
            "data": data,
            "backbone": str(backbone),
            "run": tmp_path / "run",
            "input_size": "48",
            "normalization": "backbone",
            "epochs": 1,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "workers": 2,
        }
        return TrainSettings(**{**values, **changes})

    return make
