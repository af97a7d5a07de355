"""A sweep through the whole pipeline: its models are those that training alone makes."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fpt_fast.cache import CacheMismatch
from fpt_fast.config import ConfigError
from fpt_fast.model import FptModel
from fpt_fast.pipeline import (
    PreloadSettings,
    RunExists,
    SweepResult,
    SweepSettings,
    TrainSettings,
    evaluate,
    predict,
    preload,
    sweep,
    train,
)
from fpt_fast.run_settings import RunSettings
from fpt_fast.setting_values import read_yaml

LISTED = {"learning_rate": "3e-3,1e-2", "seed": "0,2", "prompts": "3"}


@pytest.fixture
def sweep_settings(
    tmp_path: Path,
    train_settings: Callable[..., TrainSettings],
    preload_settings: Callable[..., PreloadSettings],
) -> Callable[..., SweepSettings]:
    preload(preload_settings())
    base = train_settings(run=tmp_path / "sweep")
    shared = {field.name: getattr(base, field.name) for field in dataclasses.fields(RunSettings)}
    shared["order_seed"] = 7

    def make(**changes: Any) -> SweepSettings:
        return SweepSettings(**{**shared, **LISTED, **changes})

    return make


def logits_of(result: SweepResult, name: str) -> list[list[str]]:
    with (result.folder / name / "predictions.csv").open() as file:
        return list(csv.reader(file))


@pytest.mark.usefixtures("whole_figures")
def test_every_model_is_that_of_training_alone(
    sweep_settings: Callable[..., SweepSettings], tmp_path: Path
) -> None:
    result = sweep(sweep_settings())
    assert [row.name for row in result.rows] == [
        "lr3e-3-seed0",
        "lr3e-3-seed2",
        "lr0.01-seed0",
        "lr0.01-seed2",
    ]
    for row in result.rows:
        folder = result.folder / row.name
        # The folder's own configuration trains it anew.
        alone = TrainSettings(
            **{**read_yaml(folder / "config.yaml", TrainSettings), "run": tmp_path / row.name}
        )
        assert alone.order_seed == 7
        twin = train(alone)
        assert row.best_epoch == twin.history.best_epoch
        assert row.best_value == pytest.approx(twin.history.best_value, abs=1e-5)
        assert row.metrics == pytest.approx(dict(twin.metrics.values), abs=1e-5)
        ours, theirs = logits_of(result, row.name), logits_of_folder(tmp_path / row.name)
        assert [line[:1] for line in ours] == [line[:1] for line in theirs]
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            assert [float(x) for x in a[3:]] == pytest.approx([float(x) for x in b[3:]], abs=1e-4)
        assert (folder / "report.html").exists() and (folder / "history.csv").exists()
    assert result.best in {row.name for row in result.rows}
    assert "learning_rate" in str(result) and "±" in str(result)
    assert {"sweep.csv", "summary.csv", "summary.md", "sweep.svg"} <= {
        path.name for path in result.folder.iterdir()
    }


def logits_of_folder(folder: Path) -> list[list[str]]:
    with (folder / "predictions.csv").open() as file:
        return list(csv.reader(file))


def test_a_model_of_a_sweep_evaluates_and_predicts(
    sweep_settings: Callable[..., SweepSettings], tmp_path: Path, data: Path, backbone: Path
) -> None:
    result = sweep(sweep_settings(epochs=1))
    run = result.folder / result.rows[1].name
    assert evaluate(run=run).values["auc"] == pytest.approx(result.rows[1].metrics["auc"], abs=1e-6)
    out = tmp_path / "out.csv"
    predict(run=run, images=(data / "test",), output=out, backbone=str(backbone))
    assert len(out.read_text().splitlines()) == 7
    assert FptModel.from_pretrained(run / "best").config.num_prompts == 3


def test_resume_overwrite_and_refusals(sweep_settings: Callable[..., SweepSettings]) -> None:
    first = sweep(sweep_settings())
    with pytest.raises(RunExists, match="--overwrite"):
        sweep(sweep_settings())
    again = sweep(sweep_settings(resume=True))
    assert again.rows == first.rows
    with pytest.raises(ValueError, match="other settings"):
        sweep(sweep_settings(resume=True, learning_rate="3e-3,2e-2"))
    replaced = sweep(sweep_settings(overwrite=True, learning_rate=None, preset="ddr", epochs=1))
    assert [row.name for row in replaced.rows] == ["seed0", "seed2"]
    metrics = json.loads((replaced.folder / "seed0" / "metrics.json").read_text())
    assert metrics["best_epoch"] == 0
    config = yaml.safe_load((replaced.folder / "seed0" / "config.yaml").read_text())
    assert config["settings"]["learning_rate"] == config["training"]["learning_rate"] > 0


def test_what_cannot_be_swept(sweep_settings: Callable[..., SweepSettings]) -> None:
    with pytest.raises(ConfigError, match="augment-input"):
        sweep(sweep_settings(cache="none", augment_input=True))
    with pytest.raises(ConfigError, match="seed must list numbers"):
        sweep(sweep_settings(seed="a"))
    with pytest.raises(CacheMismatch, match="dtype: the cache has float32, .* for bfloat16"):
        sweep(sweep_settings(dtype="bfloat16"))


def test_side_networks_alone_and_live_features(
    sweep_settings: Callable[..., SweepSettings], backbone: Path
) -> None:
    alone = sweep(sweep_settings(fusion=False, epochs=1, learning_rate="1e-2"))
    assert len(alone.rows) == 2
    live = sweep(
        sweep_settings(
            run=alone.folder.with_name("live"),
            cache="none",
            backbone=str(backbone),
            input_size="48",
            normalization="backbone",
            epochs=1,
            seed="0",
        )
    )
    assert all(torch.isfinite(torch.tensor(row.metrics["auc"])) for row in live.rows)
