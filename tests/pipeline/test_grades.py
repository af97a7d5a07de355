"""Learned cut points between grades, from training to every place that grades an image."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from fpt_fast.images import ImageSetError, load_image_set
from fpt_fast.metrics import compute_metrics, predicted_classes
from fpt_fast.pipeline import (
    Predictor,
    PreloadSettings,
    TrainSettings,
    compare,
    evaluate,
    export,
    predict,
    preload,
    share,
    sweep,
    train,
)
from fpt_fast.report import read_predictions
from fpt_fast.trust import fit_grade_cuts

Make = Callable[..., TrainSettings]


@pytest.mark.usefixtures("whole_figures")
def test_cuts_are_learned_kept_and_used(
    data: Path,
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Make,
    tmp_path: Path,
) -> None:
    preload(preload_settings())
    run = tmp_path / "run"
    result = train(train_settings(loss="mean_square_error", epochs=3))
    names = tuple(json.loads((run / "metrics.json").read_text())["classes"])
    validation, _ = read_predictions(run / "validation.csv", names)
    cuts = fit_grade_cuts(validation, len(names))
    saved = json.loads((run / "best" / "config.json").read_text())["extra"]
    assert saved["grade_cuts"] == list(cuts)

    written = json.loads((run / "metrics.json").read_text())
    tested, _ = read_predictions(run / "predictions.csv", names, cuts)
    at_halves, _ = read_predictions(run / "predictions.csv", names)
    assert written["grade_cuts"]["cuts"] == list(cuts)
    assert written["kappa"] == pytest.approx(compute_metrics(tested, 3)["kappa"])
    expected = compute_metrics(at_halves, 3)["accuracy"]
    assert written["grade_cuts"]["at_halves"]["accuracy"] == pytest.approx(expected)
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    graded = [names[grade] for grade in predicted_classes(tested, 3).tolist()]
    assert [row["predicted"] for row in rows] == graded
    page = (run / "report.html").read_text()
    assert "Cut points between grades" in page and f"{cuts[0]:.3f}" in page

    assert dict(evaluate(run=run).values) == pytest.approx(dict(result.metrics.values))
    again = evaluate(run=run, split="val", resamples=0)
    assert any("chosen on these very images" in note for note in again.metrics.notes)
    assert again["kappa"] == pytest.approx(compute_metrics(
        read_predictions(run / "validation.csv", names, cuts)[0], 3)["kappa"])  # fmt: skip

    images = tuple(sorted((data / "test").rglob("*.png")))[:3]
    predict(run=run, images=images, output=tmp_path / "p.csv")
    predictor = Predictor(run)
    online = predictor(images)
    assert predictor.cuts == online.cuts == cuts
    told = [row["predicted"] for row in csv.DictReader((tmp_path / "p.csv").open())]
    assert told == [names[grade] for grade in predicted_classes(online, 3).tolist()]

    export(run=run, output=tmp_path / "model.pt2", format="program")
    import torch

    extra = {"fpt_fast": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["fpt_fast"])["grade_cuts"] == list(cuts)
    share(run=run, output=tmp_path / "shared")
    card = (tmp_path / "shared" / "README.md").read_text()
    assert f"{cuts[0]:.4f}, {cuts[1]:.4f}" in card and "quadratic kappa" in card
    assert "quadratic kappa" in str(compare(run, run, resamples=20))


def test_a_sweep_learns_the_cuts_of_each_model(
    preload_settings: Callable[..., PreloadSettings], train_settings: Make, tmp_path: Path
) -> None:
    preload(preload_settings())
    settings = train_settings(loss="mean_square_error")
    swept = sweep(
        data=settings.data, cache=settings.cache, run=tmp_path / "sweep", epochs=2, batch_size=5,
        workers=2, loss="mean_square_error", side_size="24", prompts="3", learning_rate="1e-2",
        seed="0,1", grade_cuts="accuracy",
    )  # fmt: skip
    assert "test quadratic kappa" in str(swept)
    members = []
    for row in swept.rows:
        folder = swept.folder / row.name
        written = json.loads((folder / "metrics.json").read_text())
        validation, _ = read_predictions(folder / "validation.csv", written["classes"])
        members.append(fit_grade_cuts(validation, 3, "accuracy"))
        assert written["grade_cuts"]["cuts"] == pytest.approx(members[-1])
    mean = [sum(cuts) / 2 for cuts in zip(*members, strict=True)]
    assert Predictor(swept.folder).cuts == pytest.approx(mean)


def test_halves_and_judging_by_the_images_of_choice(
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Make,
    tmp_path: Path,
) -> None:
    preload(preload_settings())
    train(train_settings(loss="smooth_l1", grade_cuts="halves"))
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    saved = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert "grade_cuts" not in written and "grade_cuts" not in saved["extra"]
    assert Predictor(tmp_path / "run").cuts is None


def test_grades_with_names_are_in_the_order_that_is_given(
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Make,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "fpt_fast")
    preload(preload_settings())
    order = ("severe", "healthy", "mild")
    run = train(train_settings(loss="smooth_l1", class_order=order, epochs=1)).run
    assert "grades, the lowest first: severe < healthy < mild" in caplog.text
    assert "--class-order" not in caplog.text
    assert Predictor(run).classes == order
    assert json.loads((run / "metrics.json").read_text())["classes"] == list(order)
    told, _ = read_predictions(run / "predictions.csv", order)
    for key, label in zip(told.keys, told.labels.tolist(), strict=True):
        assert order[label] == Path(key).parent.name
    assert evaluate(run=run, resamples=0).values["mae"] == pytest.approx(
        float((told.logits[:, 0] - told.labels).abs().mean()), rel=1e-3
    )
    caplog.clear()
    train(train_settings(loss="smooth_l1", run=tmp_path / "by name", epochs=1))
    assert "healthy < mild < severe; --class-order names another order" in caplog.text
    with pytest.raises(ImageSetError, match="each class once: healthy, mild, severe; got mild, se"):
        train(train_settings(class_order=("mild", "severe"), run=tmp_path / "wrong"))
    with pytest.raises(ImageSetError, match="for classes, and not for findings or numbers"):
        load_image_set(tmp_path / "x.csv", class_order=order, value_column="age")
