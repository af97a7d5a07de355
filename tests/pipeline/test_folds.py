"""Cross-validation: each image is tested once a division, on one cache, and patients stay whole."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sklearn.metrics import roc_auc_score

from fpt_fast.config import ConfigError
from fpt_fast.images import ImageSetError, load_image_set
from fpt_fast.pipeline import (
    Predictor,
    PreloadSettings,
    SweepResult,
    TrainSettings,
    evaluate,
    explain,
    preload,
    sweep,
    train,
)
from fpt_fast.pipeline.pooling import pool_folds
from fpt_fast.records import Predictions
from fpt_fast.report import read_predictions, write_predictions


def test_folds_are_equal_disjoint_and_whole(data: Path) -> None:
    seen: Counter[str] = Counter()
    for number in range(1, 5):
        images = load_image_set(data, fold=f"{number}/4", patient_pattern=r"(\d)\.png")
        sides: dict[str | None, set[str]] = defaultdict(set)
        for item in images.items:
            sides[item.patient].add(item.split)
        assert all(len(found) == 1 for found in sides.values())
        assert images.of_split("train") and images.of_split("val")
        seen.update(item.key for item in images.of_split("test"))
    assert set(seen.values()) == {1} and len(seen) == 24
    sizes = [len(load_image_set(data, fold=f"{n}/4").of_split("test")) for n in range(1, 5)]
    assert sizes == [6, 6, 6, 6]
    other = load_image_set(data, fold="1/4", seed=1)
    assert other.of_split("test") != load_image_set(data, fold="1/4").of_split("test")
    for wrong in ("0/4", "5/4", "1/1", "two"):
        with pytest.raises(ImageSetError, match="fold must be like 2/5"):
            load_image_set(data, fold=wrong)
    with pytest.raises(ImageSetError, match="25 folds need"):
        load_image_set(data, fold="1/25")


def _are_pooled(run: Path, repeat: int, data: Path, swept: SweepResult) -> None:
    """The pooled folder has what the folds' own files have, its metrics are scikit-learn's, and
    the summary states them beside mean and spread."""
    row = swept.pooled[repeat - 1]
    folder = run / row.name
    assert folder.parent.name == f"repeat-{repeat}-pooled"
    pooled, classes = read_predictions(folder / "predictions.csv")
    assert set(pooled.keys) == {item.key for item in load_image_set(data).items}
    lines = (folder / "predictions.csv").read_text().splitlines()[1:]
    for number in (1, 2):
        fold = run / f"repeat-{repeat}-fold-{number}" / folder.name / "predictions.csv"
        assert set(fold.read_text().splitlines()[1:]) <= set(lines)
    values = json.loads((folder / "metrics.json").read_text())
    probabilities = pooled.probabilities
    assert probabilities is not None and tuple(values["classes"]) == classes
    scores = probabilities.double() / probabilities.double().sum(dim=1, keepdim=True)
    expected = roc_auc_score(pooled.labels, scores, multi_class="ovr", average="macro")
    assert values["auc"] == pytest.approx(expected, abs=1e-6)
    # Of logarithms of probabilities it would be another number than the models'.
    assert "auc_raw_logits" not in values and "auc_raw_logits" not in values["intervals"]["values"]
    summary = (run / "summary.md").read_text()
    interval = row.assessment.intervals["auc"]  # type: ignore[index]
    assert f"| {row.name} | 24 | {interval} |" in summary and "±" in summary
    assert str(swept) == summary


def test_pooled_intervals_draw_patients_and_no_image_comes_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folds = []
    for number in (0, 1):
        labels = torch.arange(20) % 2
        # The five images of a patient are alike, so a patient says little more than one image.
        own = torch.randn(4).repeat_interleave(5)[:, None] * torch.tensor([[1.0, -1.0]])
        keys = tuple(f"{number}-{row}.png" for row in range(20))
        predictions = Predictions(keys, labels, own, own.softmax(1))
        folds.append(tmp_path / f"fold-{number}" / "model")
        write_predictions(folds[-1] / "predictions.csv", predictions, ("no", "yes"))
    patients = {f"{n}-{row}.png": f"{n}-{row // 5}" for n in (0, 1) for row in range(20)}
    by_image = pool_folds(folds, tmp_path / "images" / "model", ("no", "yes"), None)
    by_patient = pool_folds(folds, tmp_path / "patients" / "model", ("no", "yes"), patients)
    assert by_patient.images == by_image.images == 40
    units = [r.assessment.intervals.units for r in (by_image, by_patient)]  # type: ignore[union-attr]
    assert units == ["images", "patients"]
    grades = Predictions(("a", "b"), torch.tensor([0, 1]), torch.tensor([[0.2], [0.9]]), None)
    write_predictions(tmp_path / "graded" / "predictions.csv", grades, ("no", "yes"))
    graded = pool_folds([tmp_path / "graded"], tmp_path / "grades" / "m", ("no", "yes"), None)
    assert "cut at the halves" in graded.assessment.metrics.notes[-1]
    with pytest.raises(ConfigError, match=r"'0-0.png' was tested in two folds"):
        pool_folds([folds[0], folds[0]], tmp_path / "twice" / "model", ("no", "yes"), None)


def test_a_sweep_over_folds_shares_a_cache_and_sums_up(
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Callable[..., TrainSettings],
    tmp_path: Path,
) -> None:
    settings = preload_settings()
    preload(settings)
    shared = {
        "data": settings.data, "cache": str(settings.cache), "epochs": 1, "batch_size": 8,
        "workers": 2, "side_size": "24", "report_images": 0,
    }  # fmt: skip
    run = tmp_path / "cv"
    swept = sweep(**shared, run=run, prompts="3", learning_rate="1e-2", folds=2, repeats=2)
    assert len(swept.rows) == 4 and "±" in str(swept)
    assert (run / "summary.md").is_file() and (run / "sweep.csv").is_file()
    for repeat in (1, 2):
        keys: Counter[str] = Counter()
        for number in (1, 2):
            [model] = [p for p in (run / f"repeat-{repeat}-fold-{number}").iterdir() if p.is_dir()]
            predictions, _ = read_predictions(model / "predictions.csv")
            keys.update(predictions.keys)
        assert set(keys.values()) == {1} and len(keys) == 24
        _are_pooled(run, repeat, settings.data, swept)
    # All of them are an ensemble; to evaluate, one must be named.
    assert len(Predictor(run, backbone=str(tmp_path / "golden-vit")).runs) == 4
    for several in (run, run / "repeat-1-fold-1"):
        with pytest.raises(ConfigError, match=r"name one of its models: .*repeat-1-fold-1"):
            evaluate(run=several)
    with pytest.raises(ConfigError, match=r"holds no trained model: .*name one of its models"):
        explain(run=run, images=[settings.data / "test"], output=None)
    # A model of a fold knows its own split.
    assert evaluate(run=model, resamples=0).values == pytest.approx(swept.rows[-1].metrics)
    alone = train(train_settings(fold="2/2", split_seed=1, epochs=1, batch_size=8, order_seed=0))
    for name, value in swept.rows[-1].metrics.items():
        assert alone.metrics[name] == pytest.approx(value, abs=1e-4)
    with pytest.raises(ConfigError, match="at least 2"):
        sweep(**shared, run=tmp_path / "x", folds=1)
