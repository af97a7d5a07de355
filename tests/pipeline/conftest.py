"""A frozen model on disk and a data set, small enough to run the whole method in a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_run import write_backbone

from fpt_fast.pipeline import PreloadSettings, TrainSettings
from fpt_fast.report import figures, sheets, sweep
from helpers import write_image_set

INPUT = "48"


def draw_only(draw: Callable[[Any], None], size: tuple[float, float]) -> bytes:
    """``fpt_fast.report.figures.render`` without the figure's layout and its writing."""
    from matplotlib.figure import Figure

    draw(Figure(figsize=size, layout="constrained"))
    return b'<svg xmlns="http://www.w3.org/2000/svg"/>'


@pytest.fixture
def whole_figures() -> None:
    """For tests whose reports shall have their figures."""


@pytest.fixture(autouse=True)
def figures_are_drawn_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layout and writing of a report's figures are most of a small run's time."""
    if "whole_figures" not in request.fixturenames:
        for module in (figures, sweep):
            monkeypatch.setattr(module, "render", draw_only)


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """The four pictures of every explained image at a tenth of their size."""
    for name, edge in (("_LONGEST", 64), ("_LARGEST", 32), ("_SMALLEST", 32)):
        monkeypatch.setattr(sheets, name, edge)


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    return write_backbone(tmp_path / "golden-vit")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """24 images of 3 classes; names repeat between classes and splits."""
    return write_image_set(tmp_path / "images")


@pytest.fixture
def preload_settings(tmp_path: Path, backbone: Path, data: Path) -> Callable[..., PreloadSettings]:
    """Settings of a small f32 preload; keyword arguments change them."""

    def make(**changes: Any) -> PreloadSettings:
        values: dict[str, Any] = {
            "data": data,
            "backbone": str(backbone),
            "cache": tmp_path / "cache",
            "input_size": INPUT,
            "normalization": "backbone",
            "dtype": "float32",
            "batch_size": 5,
            "workers": 2,
        }
        return PreloadSettings(**{**values, **changes})

    return make


@pytest.fixture
def train_settings(tmp_path: Path, data: Path) -> Callable[..., TrainSettings]:
    """Settings of a two-epoch run on that cache; keyword arguments change them."""

    def make(**changes: Any) -> TrainSettings:
        values: dict[str, Any] = {
            "data": data,
            "cache": str(tmp_path / "cache"),
            "run": tmp_path / "run",
            "side_size": "24",
            "num_prompts": 3,
            "epochs": 2,
            "batch_size": 5,
            "learning_rate": 1e-2,
            "workers": 2,
        }
        return TrainSettings(**{**values, **changes})

    return make
