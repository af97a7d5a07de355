"""Intervals against scipy's bootstrap, and resampled metrics against metrics of real resamples."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from trust.samples import make, make_regression, picked

from fpt_fast.metrics import compute_metrics
from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.trust import bootstrap as module
from fpt_fast.trust import bootstrap_intervals, resampled_metrics


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_a_resample_has_the_metrics_of_the_images_it_draws(classes: int, ties: bool) -> None:
    predictions = make(40, classes, seed=classes, ties=ties)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 40, (25, 40))
    counts = np.stack([np.bincount(row, minlength=40) for row in rows])
    ours = resampled_metrics(predictions, classes, counts)
    for number, row in enumerate(rows):
        expected = compute_metrics(picked(predictions, row), classes)
        got = {name: float(values[number]) for name, values in ours.values.items()}
        assert got == pytest.approx(expected.values, abs=1e-12, nan_ok=True)
        for name in ("precision", "recall", "f1", "auc"):
            column = [getattr(one, name) for one in expected.per_class]
            assert ours.per_class[name][number].tolist() == pytest.approx(
                column, abs=1e-12, nan_ok=True
            )


def test_a_resample_of_a_regression() -> None:
    predictions = make_regression(30, 4)
    rows = np.random.default_rng(1).integers(0, 30, (10, 30))
    counts = np.stack([np.bincount(row, minlength=30) for row in rows])
    ours = resampled_metrics(predictions, 4, counts)
    for number, row in enumerate(rows):
        expected = compute_metrics(picked(predictions, row), 4)
        got = {name: float(values[number]) for name, values in ours.values.items()}
        assert got == pytest.approx(expected.values, abs=1e-12)


def test_specificity_is_the_recall_of_the_rest() -> None:
    predictions = make(50, 3)
    ours = resampled_metrics(predictions, 3, np.ones((1, 50), dtype=np.int64))
    for label in range(3):
        expected = sklearn.metrics.recall_score(
            predictions.labels != label, predictions.logits.argmax(dim=1) != label
        )
        assert ours.per_class["specificity"][0, label] == pytest.approx(expected, abs=1e-12)


def with_our_draws(
    predictions: Predictions, method: str, statistic: Any, data: tuple[np.ndarray, ...]
) -> Any:
    """scipy's interval from the very resamples that ours is from."""
    labels = predictions.labels.numpy()
    strata = tuple(np.flatnonzero(labels == label) for label in np.unique(labels))
    rng = np.random.default_rng(3)
    counts = module._draw(strata, 999, rng)
    metrics = resampled_metrics(predictions, 2, counts)
    name = "auc" if statistic is area else "accuracy"
    options: dict[str, Any] = {"method": method, "vectorized": False}
    any_draws = scipy.stats.bootstrap(data, statistic, n_resamples=9, **options)
    our_draws = dataclasses.replace(any_draws, bootstrap_distribution=metrics.values[name])
    return scipy.stats.bootstrap(
        data, statistic, n_resamples=0, confidence_level=0.9, bootstrap_result=our_draws, **options
    ).confidence_interval


def area(negative: np.ndarray, positive: np.ndarray) -> float:
    greater = (positive[:, None] > negative[None, :]).mean()
    return float(greater + (positive[:, None] == negative[None, :]).mean() / 2)


def share(*right: np.ndarray) -> float:
    return float(np.concatenate(right).mean())


@pytest.mark.parametrize("statistic", [area, share])
@pytest.mark.parametrize(("method", "theirs"), [("percentile", "percentile"), ("bca", "BCa")])
def test_intervals_are_those_of_scipy(method: Any, theirs: str, statistic: Any) -> None:
    predictions = make(60, 2, seed=4)
    assert predictions.probabilities is not None
    labels = predictions.labels.numpy()
    column = (
        predictions.probabilities[:, 1].numpy()
        if statistic is area
        else (predictions.logits.argmax(dim=1) == predictions.labels).numpy().astype(float)
    )
    data = (column[labels == 0], column[labels == 1])
    expected = with_our_draws(predictions, theirs, statistic, data)
    ours = bootstrap_intervals(predictions, 2, level=0.9, resamples=999, method=method, seed=3)
    name = "auc" if statistic is area else "accuracy"
    assert ours[name].low == pytest.approx(expected.low, abs=1e-9)
    assert ours[name].high == pytest.approx(expected.high, abs=1e-9)
    assert ours[name].estimate == pytest.approx(compute_metrics(predictions, 2)[name], abs=1e-12)


def test_classes_keep_their_size_and_equal_seeds_give_equal_intervals() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [2] * 4)
    strata = module._strata(np.arange(13), labels)
    counts = module._draw(strata, 50, np.random.default_rng(0))
    for label, size in enumerate((7, 2, 4)):
        assert (counts[:, labels == label].sum(axis=1) == size).all()
    assert len(np.unique(counts, axis=0)) > 40
    predictions = make(30, 3)
    first, again, other = (
        bootstrap_intervals(predictions, 3, resamples=200, seed=seed).to_json()["values"]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_patients_are_drawn_whole() -> None:
    """20 images of each of 10 patients, all alike: intervals are those of 10 images, not of 200."""
    few = make(10, 2, seed=6)
    many = picked(few, np.repeat(np.arange(10), 20))
    patients = [f"patient {i // 20}" for i in range(200)]
    by_patient = bootstrap_intervals(many, 2, groups=patients, resamples=500)
    of_ten = bootstrap_intervals(few, 2, resamples=500)
    by_image = bootstrap_intervals(many, 2, resamples=500)
    assert (by_patient.units, by_image.units) == ("patients", "images")
    for name in ("auc", "accuracy", "kappa"):
        assert by_patient[name].low == pytest.approx(of_ten[name].low, abs=1e-12)
        assert by_patient[name].high == pytest.approx(of_ten[name].high, abs=1e-12)
    width = {name: i.high - i.low for name, i in by_image.values.items()}
    assert width["accuracy"] < (by_patient["accuracy"].high - by_patient["accuracy"].low) / 2


def test_a_patient_counts_for_the_class_of_most_of_its_images() -> None:
    strata = module._strata(np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 0, 1, 0]))
    assert [members.tolist() for members in strata] == [[2], [0, 1]]


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """AUC of two normal distributions one deviation apart: 0.7602 = Phi(1 / sqrt 2)."""
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        score = np.concatenate([rng.normal(size=60), rng.normal(1, 1, size=60)])
        logits = torch.as_tensor(np.stack([-score, score], axis=1), dtype=torch.float32)
        labels = torch.arange(120) // 60
        predictions = Predictions(
            tuple(map(str, range(120))), labels, logits, logits.softmax(dim=1)
        )
        interval = bootstrap_intervals(predictions, 2, resamples=400)["auc"]
        covered += interval.low <= 0.76025 <= interval.high
    assert 88 <= covered <= 99


def test_without_labels_and_without_a_class() -> None:
    whole = make(30, 3)
    labels = torch.where(whole.labels == 2, UNLABELLED, whole.labels)
    predictions = Predictions(whole.keys, labels, whole.logits, whole.probabilities)
    known = np.flatnonzero(labels.numpy() != UNLABELLED)
    patients = [
        key if label >= 0 else "nobody"
        for key, label in zip(whole.keys, labels.tolist(), strict=True)
    ]
    ours = bootstrap_intervals(predictions, 3, resamples=100, groups=patients)
    expected = bootstrap_intervals(picked(predictions, known), 3, resamples=100)
    # Names are numbered in alphabetical order, so the draws differ; the estimates may not.
    assert ours["auc"].estimate == expected["auc"].estimate
    assert math.isnan(ours.per_class["auc"][2].low)
    assert ours.to_json()["per_class"]["auc"][2] == [None, None]


def test_one_class_alone_has_no_interval_of_auc() -> None:
    logits = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(12, dtype=torch.int64)
    predictions = Predictions(tuple("abcdefghijkl"), labels, logits, logits.softmax(dim=1))
    for method in ("percentile", "bca"):
        ours = bootstrap_intervals(predictions, 2, resamples=50, method=method)  # type: ignore[arg-type]
        assert math.isnan(ours["auc"].low)
        assert ours["accuracy"].low <= ours["accuracy"].estimate <= ours["accuracy"].high
        assert ours.undefined["auc"] == 50


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"level": 1.0}, "level must be between 0 and 1.*got 1.0"),
        ({"resamples": 1}, "resamples must be at least 2.*got 1"),
        ({"method": "basic"}, "percentile or bca, got 'basic'"),
        ({"groups": ["a"]}, "each of 20 images, got 1 names"),
    ],
)
def test_what_cannot_be_resampled(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bootstrap_intervals(make(20, 2), 2, **changes)


def test_counts_must_fit() -> None:
    with pytest.raises(ValueError, match=r"counts must be \[resamples, 20\].*got shape \(1, 3\)"):
        resampled_metrics(make(20, 2), 2, np.ones((1, 3), dtype=np.int64))
