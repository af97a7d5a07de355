"""A number per image, from a list's column to predictions in its unit."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpt_fast.config import ConfigError
from fpt_fast.images import ImageSetError, load_image_set
from fpt_fast.losses import build_loss
from fpt_fast.model import FptModel
from fpt_fast.pipeline import (
    Predictor,
    PreloadSettings,
    TrainSettings,
    compare,
    doctor,
    evaluate,
    export,
    predict,
    preload,
    share,
    sweep,
    train,
)
from fpt_fast.pipeline.recipe import make_recipe
from fpt_fast.report import read_predictions

Make = Callable[..., TrainSettings]
LISTED = {"value_column": "age", "patient_column": "patient"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """60 images of 20 patients, the brighter the older: 40 to 90 years."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "ages"
    folder.mkdir()
    lines = ["path,patient,age"]
    for number in range(60):
        bright = rng.random()
        pixels = rng.integers(0, 40, (48, 40, 3)) + int(200 * bright)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        lines.append(f"{number}.png,p{number // 3},{40 + 50 * bright:.2f}")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


@pytest.mark.usefixtures("whole_figures")
def test_from_a_list_to_predictions_in_the_unit_of_the_numbers(
    data: Path,
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Make,
    tmp_path: Path,
) -> None:
    preload(preload_settings(**LISTED))
    run = tmp_path / "run"
    result = train(train_settings(**LISTED, epochs=12))
    assert result.history.monitor == "mae" and "classes" not in result.metrics.notes
    learned = evaluate(run=run, split="train", resamples=0)
    assert learned["r2"] > 0.5
    images = load_image_set(data, **LISTED)  # type: ignore[arg-type]
    ages = [item.value for item in images.of_split("train")]
    extra = json.loads((run / "best" / "config.json").read_text())["extra"]
    assert extra["target"] == pytest.approx([np.mean(ages), np.std(ages)])  # type: ignore[arg-type]

    written = json.loads((run / "metrics.json").read_text())
    told, names = read_predictions(run / "predictions.csv")
    error = (told.logits[:, 0] - told.labels).abs().mean()
    assert names == ("age",) and written["mae"] == pytest.approx(float(error))
    assert written["intervals"]["units"] == "patients" and "grade_cuts" not in written
    assert dict(evaluate(run=run).values) == pytest.approx(dict(result.metrics.values))
    assert "Predicted against true" in (run / "report.html").read_text()

    test = [item.path for item in images.of_split("test")]
    predict(run=run, images=tuple(test), output=tmp_path / "p.csv")
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    by_key = dict(zip(told.keys, told.logits[:, 0].tolist(), strict=True))
    for path, row in zip(test, rows, strict=True):
        assert set(row) == {"path", "value_age"}
        assert float(row["value_age"]) == pytest.approx(by_key[path.name], abs=0.05)
    online = Predictor([run, run])(test)
    assert online.labels.isnan().all() and online.probabilities is None
    assert online.logits[:, 0].tolist() == pytest.approx([float(r["value_age"]) for r in rows])

    exported = export(run=run, output=tmp_path / "model.pt2", format="program")
    assert exported.difference < 0.01
    share(run=run, output=tmp_path / "shared", data_set="ages")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert "A regression of age" in card and "| r2 |" in card and "is age (`target`" in card
    model = FptModel.from_pretrained(tmp_path / "shared")
    assert model.extra["target"] == extra["target"]
    assert "mae" in str(compare(run, run, resamples=20))
    assert doctor(run=run, workers=2).ok


def test_a_sweep_over_folds_trains_what_train_trains(
    data: Path,
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Make,
    tmp_path: Path,
) -> None:
    preload(preload_settings(**LISTED))
    alone = train(train_settings(**LISTED, loss="smooth_l1", fold="2/2", monitor="r2"))
    settings = train_settings(**LISTED)
    swept = sweep(
        data=data, cache=settings.cache, run=tmp_path / "sweep", epochs=2, batch_size=5, workers=2,
        loss="smooth_l1", side_size="24", prompts="3", learning_rate="1e-2", folds=2,
        monitor="r2", **LISTED,
    )  # fmt: skip
    for name, value in alone.metrics.items():
        assert swept.rows[1].metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-3)
    assert swept.monitor == "r2" and "test_rmse" in str(swept)
    pooled = json.loads((tmp_path / "sweep/repeat-1-pooled/metrics.json").read_text()) if (
        tmp_path / "sweep/repeat-1-pooled/metrics.json").is_file() else None  # fmt: skip
    assert pooled is None or pooled["mae"] > 0


def test_splits_have_their_shares_of_low_and_high_numbers(data: Path) -> None:
    images = load_image_set(data, value_column="age")
    assert (images.task, images.classes) == ("regression", ("age",))
    whole = np.mean([item.value for item in images.items])  # type: ignore[arg-type]
    for split in ("train", "val", "test"):
        ages = [item.value for item in images.of_split(split)]  # type: ignore[arg-type]
        assert abs(np.mean(ages) - whole) < 7  # type: ignore[arg-type]
        assert max(ages) > 70 and min(ages) < 60  # type: ignore[type-var,operator]


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("", "row 3: 1.png has no age"),
        ("old", "row 3: age must be a number, got 'old'"),
        ("3,5", r"row 3: age must be a number, got '3,5' \(write a point"),
        ("nan", "row 3: age must be a finite number, got 'nan'; leave the row out"),
        ("-inf", "row 3: age must be a finite number"),
        ("1_0", "row 3: age must be a finite number"),
    ],
)
def test_cells_that_are_no_numbers_are_named_by_row(tmp_path: Path, cell: str, said: str) -> None:
    for number in range(3):
        (tmp_path / f"{number}.png").touch()
    lines = ["path;age", "0.png;-1", f"1.png;{cell}", "2.png;1e2"]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    with pytest.raises(ImageSetError, match=said):
        load_image_set(tmp_path / "list.csv", value_column="age", ratios=(1, 0, 0))
    (tmp_path / "list.csv").write_text("\n".join([*lines[:2], *lines[3:]]))
    images = load_image_set(tmp_path / "list.csv", value_column="age", ratios=(1, 0, 0))
    assert [item.value for item in images.items] == [-1.0, 100.0]


def test_settings_that_do_not_fit_numbers_are_refused(data: Path, train_settings: Make) -> None:
    images = load_image_set(data, value_column="age")
    listed = {"value_column": "age"}
    with pytest.raises(ConfigError, match="loss 'kappa' is for classes, and the data has numbers"):
        make_recipe(train_settings(**listed, loss="kappa"), images)
    with pytest.raises(ConfigError, match="--sampling balanced is for classes"):
        make_recipe(train_settings(**listed, sampling="balanced"), images)
    with pytest.raises(ImageSetError, match="give label_columns or value_column"):
        load_image_set(data, value_column="age", label_columns=("age",))
    with pytest.raises(ImageSetError, match="value_column need a CSV list"):
        load_image_set(data.parent, value_column="age")


def test_the_loss_is_of_numbers_in_deviations_from_their_mean(
    data: Path, train_settings: Make
) -> None:
    images = load_image_set(data, value_column="age")
    recipe = make_recipe(train_settings(value_column="age"), images)
    assert recipe.loss == "mean_square_error" and recipe.target is not None
    mean, deviation = recipe.target
    labels = torch.tensor([mean, mean + 2 * deviation], dtype=torch.float64)
    loss = build_loss(recipe)(torch.tensor([[0.0], [1.0]]), labels)
    assert float(loss) == pytest.approx(0.5, abs=1e-6)


def test_the_doctor_names_outliers_and_ranges(data: Path) -> None:
    lines = data.read_text().splitlines()
    lines[8] = lines[8].rpartition(",")[0] + ",4500"
    data.write_text("\n".join(lines))
    said = str(doctor(data=data, workers=2, **LISTED))
    assert "of 1 image the age is far from all others" in said and "7.png: 4500" in said
    assert "age in train: 4" in said and "are few to learn or judge" in said
