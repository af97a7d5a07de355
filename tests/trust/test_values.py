"""Metrics of a number per image, against scikit-learn and scipy; resamples; the comparison."""

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch

from fpt_fast.metrics import compute_metrics, metric_names
from fpt_fast.records import Predictions
from fpt_fast.trust import assess, bootstrap_intervals, compare_predictions
from fpt_fast.trust.resampled_values import ValueResampler
from fpt_fast.value_metrics import VALUE_METRICS


def make(seed: int, count: int = 40, *, ties: bool = False, offset: float = 0.0) -> Predictions:
    rng = np.random.default_rng(0)
    labels = 10 * rng.normal(size=count)
    values = labels + 8 * np.random.default_rng(seed).normal(size=count)
    if ties:
        labels, values = np.round(labels / 5) * 5, np.round(values / 5) * 5
    keys = tuple(f"{i}.png" for i in range(count))
    return Predictions(
        keys, torch.as_tensor(labels + offset), torch.as_tensor(values + offset)[:, None], None
    )


def expected(labels: np.ndarray, values: np.ndarray) -> dict[str, float]:
    return {
        "mae": sklearn.metrics.mean_absolute_error(labels, values),
        "rmse": sklearn.metrics.root_mean_squared_error(labels, values),
        "r2": sklearn.metrics.r2_score(labels, values),
        "pearson": scipy.stats.pearsonr(labels, values).statistic,
        "spearman": scipy.stats.spearmanr(labels, values).statistic,
    }


def arrays(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    return predictions.labels.numpy(), predictions.logits[:, 0].numpy()


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("ties", [False, True])
def test_metrics_are_those_of_scikit_learn_and_scipy(ties: bool, offset: float) -> None:
    for seed in range(1, 6):
        predictions = make(seed, ties=ties, offset=offset)
        found = compute_metrics(predictions, 1)
        assert dict(found) == pytest.approx(expected(*arrays(predictions)), abs=1e-6)
    assert metric_names(regression=True, values=True) == VALUE_METRICS == tuple(found)


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_resamples_are_those_of_the_images_drawn(ties: bool) -> None:
    predictions = make(1, ties=ties)
    labels, values = arrays(predictions)
    rng = np.random.default_rng(3)
    draws = rng.integers(0, len(labels), (20, len(labels)))
    counts = np.stack([np.bincount(draw, minlength=len(labels)) for draw in draws])
    found = ValueResampler(predictions)(counts)
    for row, draw in enumerate(draws):
        for name, value in expected(labels[draw], values[draw]).items():
            assert found.values[name][row] == pytest.approx(value, abs=1e-6)


def test_unknown_labels_are_left_out_of_metrics_and_intervals() -> None:
    known = make(1)
    labels = torch.cat([known.labels, torch.full((5,), torch.nan, dtype=torch.float64)])
    values = torch.cat([known.logits, torch.full((5, 1), 1e3, dtype=torch.float64)])
    keys = (*known.keys, *"abcde")
    both = Predictions(keys, labels, values, None)
    assert compute_metrics(both, 1).values == compute_metrics(known, 1).values
    assert "5 of 45 labels are unknown" in compute_metrics(both, 1).notes[0]
    ours, theirs = (bootstrap_intervals(p, 1, resamples=100) for p in (both, known))
    assert {n: str(i) for n, i in ours.values.items()} == {
        n: str(i) for n, i in theirs.values.items()
    }
    assert "stratified" not in ours.describe()
    assert ours["mae"].low < ours["mae"].estimate < ours["mae"].high
    groups = [f"patient {i // 5}" for i in range(45)]
    assert bootstrap_intervals(both, 1, resamples=100, groups=groups).units == "patients"


def test_what_is_alike_has_no_correlation() -> None:
    keys = ("a", "b", "c")
    flat = torch.full((3,), 2.5, dtype=torch.float64)
    sloped = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    same_labels = compute_metrics(Predictions(keys, flat, sloped[:, None], None), 1)
    assert np.isnan([same_labels[name] for name in ("r2", "pearson", "spearman")]).all()
    assert "labels of this split are alike" in same_labels.notes[0]
    same_values = compute_metrics(Predictions(keys, sloped, flat[:, None], None), 1)
    assert np.isnan(same_values["pearson"]) and same_values["r2"] < 0
    assert "predictions are alike" in same_values.notes[0]
    with pytest.raises(ValueError, match="first for 'b'"):
        compute_metrics(
            Predictions(keys, sloped, torch.tensor([[1.0], [torch.nan], [2.0]]), None), 1
        )
    with pytest.raises(ValueError, match="3 images without a label"):
        compute_metrics(Predictions(keys, flat * torch.nan, sloped[:, None], None), 1)


def test_two_runs_are_compared_by_the_bootstrap_of_their_difference() -> None:
    first, second = make(1), make(2)
    comparison = compare_predictions(first, second, ("age",), resamples=200)
    assert comparison.auc is None
    for name in VALUE_METRICS:
        wanted = expected(*arrays(first))[name] - expected(*arrays(second))[name]
        assert comparison.differences[name].estimate == pytest.approx(wanted, abs=1e-6)
    classes = Predictions(first.keys, torch.zeros(40).long(), first.logits, None)
    with pytest.raises(ValueError, match="or of numbers"):
        compare_predictions(first, classes, ("age",), resamples=20)


def test_an_assessment_of_numbers_reads_like_any_other() -> None:
    assessment = assess(make(1), 1, validation=make(2), resamples=50)
    assert list(assessment) == list(VALUE_METRICS)
    assert assessment.calibration is None and assessment.points == ()
    assert "rmse" in str(assessment) and assessment.to_json()["intervals"]["values"]["r2"]
