"""DeLong's test against its definition, the published example, and the bootstrap."""

import math

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from trust.samples import make, make_regression, picked

from fpt_fast.records import Predictions
from fpt_fast.trust import (
    bootstrap_intervals,
    compare_areas,
    compare_macro_areas,
    compare_predictions,
)

# Albumin, total protein, K-G score and outcome of the 43 patients of DeLong et al. (1988) whom
# all three tests saw, as the manual of SAS/STAT prints them (PROC LOGISTIC, comparing ROC curves).
OVARIAN = """
3.0 5.8 10 0  3.2 6.3 5 1  3.9 6.8 3 1  2.8 4.8 6 0  3.2 5.8 3 1  0.9 4.0 5 0  2.5 5.7 8 0
1.6 5.6 5 1  3.8 5.7 5 1  3.7 6.7 6 1  3.2 5.4 4 1  3.8 6.6 6 1  4.1 6.6 5 1  3.6 5.7 5 1
4.3 7.0 4 1  3.6 6.7 4 0  2.3 4.4 6 1  4.2 7.6 4 0  4.0 6.6 6 0  3.5 5.8 6 1  3.8 6.8 7 1
3.0 4.7 8 0  4.5 7.4 5 1  3.7 7.4 5 1  3.1 6.6 6 1  4.1 8.2 6 1  4.3 7.0 5 1  4.3 6.5 4 1
3.2 5.1 5 1  2.6 4.7 6 1  3.3 6.8 6 0  1.7 4.0 7 0  3.7 6.1 5 1  3.3 6.3 7 1  4.2 7.7 6 1
3.5 6.2 5 1  2.9 5.7 9 0  2.1 4.8 7 1  2.8 6.2 8 0  4.0 7.0 7 1  3.3 5.7 6 1  3.7 6.9 5 1
3.6 6.6 5 1
"""


def by_definition(positive: np.ndarray, scores: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Areas, and their covariance by the structural components of all pairs."""
    areas, of_positives, of_negatives = [], [], []
    for score in scores:
        above, below = score[positive][:, None], score[~positive][None, :]
        psi = (above > below) + 0.5 * (above == below)
        areas.append(psi.mean())
        of_positives.append(psi.mean(axis=1))
        of_negatives.append(psi.mean(axis=0))
    m, n = int(positive.sum()), int((~positive).sum())
    return np.array(areas), np.cov(of_positives) / m + np.cov(of_negatives) / n


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positive = rng.random(50) < 0.4
    first, second = rng.normal(size=(2, 50)) + positive
    if seed % 2:
        first, second = np.round(first), np.round(second)
    ours = compare_areas(positive, first, second, level=0.9)
    areas, covariance = by_definition(positive, [first, second])
    error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    z = (areas[0] - areas[1]) / error
    reach = scipy.stats.norm.ppf(0.95) * error
    assert (ours.first, ours.second) == pytest.approx(tuple(areas), abs=1e-12)
    assert ours.first == pytest.approx(sklearn.metrics.roc_auc_score(positive, first), abs=1e-12)
    assert (ours.error, ours.z) == pytest.approx((error, z), abs=1e-9)
    assert ours.p == pytest.approx(2 * scipy.stats.norm.sf(abs(z)), abs=1e-9)
    ends = (areas[0] - areas[1] - reach, areas[0] - areas[1] + reach)
    assert (ours.low, ours.high) == pytest.approx(ends, abs=1e-9)


def test_the_published_example() -> None:
    values = np.array(OVARIAN.split(), dtype=float).reshape(-1, 4)
    assert len(values) == 43
    positive, score = values[:, 3] == 1, 10 - values[:, 2]
    protein = compare_areas(positive, values[:, 1], score)
    assert (protein.first, protein.second) == pytest.approx((0.6478, 0.7258), abs=5e-5)
    assert (protein.difference, protein.error) == pytest.approx((-0.0780, 0.1046), abs=5e-5)
    assert (protein.low, protein.high) == pytest.approx((-0.2830, 0.1271), abs=5e-5)
    assert (protein.z**2, protein.p) == pytest.approx((0.5554, 0.4561), abs=5e-5)
    for column in (0, 1):
        ours = compare_areas(positive, values[:, column], score)
        areas, covariance = by_definition(positive, [values[:, column], score])
        error = math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
        assert (ours.first, ours.error) == pytest.approx((areas[0], error), abs=1e-9)


def test_of_two_classes_macro_is_the_second_one() -> None:
    first, second = make(60, 2, seed=1), make(60, 2, seed=2)
    assert first.probabilities is not None and second.probabilities is not None
    ours, theirs = first.probabilities.numpy(), second.probabilities.numpy()
    labels = first.labels.numpy()
    macro = compare_macro_areas(labels, ours, theirs)
    assert macro == compare_areas(labels == 1, ours[:, 1], theirs[:, 1])


@pytest.mark.parametrize("classes", [3, 4])
def test_the_macro_error_is_that_of_the_stratified_bootstrap(classes: int) -> None:
    first = make(400, classes, seed=3)
    noise = torch.randn(first.logits.shape, generator=torch.Generator().manual_seed(0))
    logits = first.logits + noise
    second = Predictions(first.keys, first.labels, logits, logits.softmax(1))
    comparison = compare_predictions(first, second, [f"c{i}" for i in range(classes)])
    assert comparison.auc is not None
    paired = comparison.differences["auc"]
    assert comparison.auc.difference == pytest.approx(paired.estimate, abs=1e-12)
    width = comparison.auc.high - comparison.auc.low
    assert width == pytest.approx(paired.high - paired.low, rel=0.1)


def test_the_test_is_right_as_often_as_it_says() -> None:
    """Two equally good scores: p below 0.1 in one case of ten."""
    low = 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        positive = np.arange(80) % 2 == 0
        common = rng.normal(size=80) + positive
        first, second = common + rng.normal(size=(2, 80))
        low += compare_areas(positive, first, second).p < 0.1
    assert 25 <= low <= 58  # 40 expected, three deviations of 6 each way


def test_a_run_against_itself_has_no_difference_to_test() -> None:
    predictions = make(50, 3)
    ours = compare_predictions(predictions, predictions, "abc")
    assert ours.auc is not None
    assert (ours.auc.difference, math.isnan(ours.auc.p)) == (0.0, True)
    assert (ours.differences["kappa"].low, ours.differences["kappa"].high) == (0.0, 0.0)
    assert "no variance, no test" in str(ours)
    assert ours.to_json()["delong"]["p"] is None


def test_order_does_not_matter_and_swapping_turns_the_sign() -> None:
    first, second = make(50, 3, seed=1), make(50, 3, seed=1)
    logits = second.logits + torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
    rows = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    shuffled = Predictions(
        tuple(second.keys[i] for i in rows.tolist()),
        second.labels[rows],
        logits[rows],
        logits[rows].softmax(1),
    )
    ours = compare_predictions(first, shuffled, "abc", resamples=200)
    back = compare_predictions(shuffled, first, "abc", resamples=200)
    assert ours.auc is not None and back.auc is not None
    assert (ours.auc.z, ours.auc.p) == pytest.approx((-back.auc.z, back.auc.p), abs=1e-12)
    for name, value in bootstrap_intervals(first, 3, resamples=2).values.items():
        assert ours.first[name] == value.estimate
    assert ours.differences["accuracy"].estimate == pytest.approx(
        ours.first["accuracy"] - ours.second["accuracy"], abs=1e-12
    )


def test_regressions_are_compared_by_their_errors() -> None:
    first = make_regression(40, 3)
    second = Predictions(first.keys, first.labels, first.logits + 0.5, None)
    ours = compare_predictions(first, second, "abc", resamples=100)
    assert (ours.auc, ours.per_class) == (None, (None, None, None))
    assert set(ours.differences) >= {"mae", "mse", "kappa"}
    with pytest.raises(ValueError, match="regression and the other is not"):
        compare_predictions(first, make(40, 3), "abc")


def test_only_the_same_images_are_compared() -> None:
    predictions = make(20, 2)
    with pytest.raises(ValueError, match="1 of 20 are missing in the second, like '19.png'"):
        compare_predictions(
            predictions,
            Predictions(
                predictions.keys[:19],
                predictions.labels[:19],
                predictions.logits[:19],
                predictions.logits[:19].softmax(1),
            ),
            "ab",
        )
    others = Predictions(
        predictions.keys, 1 - predictions.labels, predictions.logits, predictions.probabilities
    )
    with pytest.raises(ValueError, match="disagree on the label of '0.png'"):
        compare_predictions(predictions, others, "ab")


def test_too_few_images() -> None:
    with pytest.raises(ValueError, match="two positive and two negative images, got 1 and 2"):
        compare_areas(np.array([1, 0, 0]), np.arange(3.0), np.arange(3.0))
    with pytest.raises(ValueError, match=r"second must be scores of \(3,\) images, got \(2,\)"):
        compare_areas(np.array([1, 0, 0]), np.arange(3.0), np.arange(2.0))
    with pytest.raises(ValueError, match=r"two images each, got images by class \{0: 2, 1: 1\}"):
        compare_macro_areas(np.array([0, 0, 1]), np.eye(3), np.eye(3))
    few = picked(make(20, 3), np.array([0, 0, 1, 2, 2]))
    compared = compare_predictions(few, few, "abc", resamples=10)
    assert compared.auc is None and compared.per_class[1] is None
    assert "AUC of b: not compared, 1 of 5 images of it: DeLong's test takes two" in str(compared)
    assert str(compared).count("not compared") == 1
