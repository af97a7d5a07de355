"""Training in each tier, on a simulated device: the same run as with the cache in place."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tape import TapeCapture
from safetensors.torch import load_file
from tiers.simulation import AtOnce

from fpt_fast.config import ConfigError
from fpt_fast.pipeline import PreloadSettings, TrainSettings, placing, preload, train
from fpt_fast.pipeline.sweep import sweep
from fpt_fast.run_settings import SweepSettings

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]
GB = 10**9


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> list[AtOnce]:
    """The choice believes in a GPU, copies go to a simulation, and the model learns on the CPU."""
    made: list[AtOnce] = []

    def open_streams(device: torch.device) -> AtOnce:
        made.append(AtOnce())
        return made[-1]

    real = placing.Sizes
    monkeypatch.setattr(placing, "Sizes", lambda **values: real(**{**values, "device": "cuda"}))
    monkeypatch.setattr(placing, "_open_streams", open_streams)
    monkeypatch.setattr(placing, "_free_device_bytes", lambda device: 40 * GB)
    return made


def weights(run: Path) -> bytes:
    return (run / "last" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("features", "wanted"), [("float16", ("auto", "pinned")), ("int8", ("disk",))]
)
def test_every_tier_trains_the_same_model(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
    features: str,
    wanted: tuple[str, ...],
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    preload(preload_settings(features=features))
    in_place = train(train_settings())
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert memory["features"]["train"]["tier"] == "in place"
    devices: list[AtOnce] = request.getfixturevalue("pretend_gpu")
    for tier in wanted:
        run = tmp_path / tier
        with caplog.at_level(logging.INFO, logger="fpt_fast"):
            result = train(train_settings(run=run, features_on=tier))
        assert weights(run) == weights(tmp_path / "run")
        assert result.metrics.values == in_place.metrics.values
        memory = json.loads((run / "memory.json").read_text())
        expected = "resident" if tier == "auto" else tier
        assert [memory["features"][s]["tier"] for s in ("train", "val")] == [expected] * 2
        assert memory["staging_device_bytes"] > 0
        stored = memory["features"]["train"]
        assert bool(stored["device_bytes"]) == (expected == "resident")
        assert bool(stored["host_bytes"]) == (expected == "pinned")
        assert f"features of train: {expected}, since" in caplog.text
        assert f"memory: features of train {expected}" in caplog.text
    assert len(devices) == len(wanted)


def test_a_sweep_in_a_tier(
    preload_settings: MakePreload, data: Path, tmp_path: Path, pretend_gpu: list[AtOnce]
) -> None:
    preload(preload_settings())
    shared = {"data": data, "cache": str(tmp_path / "cache"), "side_size": "24", "epochs": 1}

    def swept(tier: Any) -> dict[str, Any]:
        settings = SweepSettings(run=tmp_path / tier, seed="0-1", features_on=tier, **shared)
        return {row.name: row.metrics for row in sweep(settings).rows}

    assert swept("resident") == swept("disk")
    assert len(pretend_gpu) == 2


def test_tiers_that_cannot_be(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    with pytest.raises(ConfigError, match="--features-on resident is for a model on a GPU"):
        train(train_settings(features_on="resident"))
    live = train_settings(cache="none", backbone=str(tmp_path), features_on="disk")
    with pytest.raises(ConfigError, match="--features-on: goes with a cache only"):
        train(live)


@pytest.mark.parametrize("tier", ["resident", "disk"])
@pytest.mark.usefixtures("pretend_gpu")
def test_a_captured_step_with_all_that_belongs_to_it(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
    tier: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Augmentation, forward, backward and optimiser written down once, then done again: the model
    that the ordinary step gives, whichever memory its features come from."""
    preload(preload_settings())
    ordinary = train(train_settings(features_on=tier))
    capture = TapeCapture()
    for module in ("fpt_fast.trainer.loop", "fpt_fast.pipeline.training"):
        monkeypatch.setattr(f"{module}.choose_capture", lambda *_: (capture, "it is a tape"))
    with caplog.at_level(logging.INFO, logger="fpt_fast"):
        captured = train(train_settings(run=tmp_path / "captured", features_on=tier))
    # 12 images in batches of 5: two sizes, in one store or in two slots that take turns.
    assert len(capture.tapes) == (2 if tier == "resident" else 4)
    assert capture.replays == 2 * 3
    assert "augmented on the device within the step" in caplog.text
    for one, other in zip(ordinary.history.epochs, captured.history.epochs, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
    weights = [
        load_file(tmp_path / run / "last" / "model.safetensors") for run in ("run", "captured")
    ]
    for name, expected in weights[0].items():
        got = weights[1][name]
        if name.endswith("qkv.bias"):
            # The gradient to the keys' third is rounding alone, of which Adam makes whole steps.
            (q, _, v), (other_q, _, other_v) = expected.chunk(3), got.chunk(3)
            expected, got = torch.cat((q, v)), torch.cat((other_q, other_v))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
