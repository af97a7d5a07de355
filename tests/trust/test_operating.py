"""Thresholds against scikit-learn's ROC curve, and their rates on other images."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from trust.samples import make, make_regression, picked

from fpt_fast.records import Predictions
from fpt_fast.trust import Bootstrap, choose_thresholds, operating_points


def binary(labels: list[int], positive: list[float]) -> Predictions:
    probability = torch.tensor(positive)
    probabilities = torch.stack([1 - probability, probability], dim=1)
    keys = tuple(map(str, range(len(labels))))
    return Predictions(keys, torch.tensor(labels), probabilities.log(), probabilities)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("wanted", [0.5, 0.9, 1.0])
def test_thresholds_are_the_best_of_the_roc_curve(classes: int, wanted: float, ties: bool) -> None:
    predictions = make(90, classes, seed=classes, ties=ties)
    assert predictions.probabilities is not None
    chosen = choose_thresholds(predictions, at_sensitivity=(wanted,), at_specificity=(wanted,))
    labels = [1] if classes == 2 else range(classes)
    assert [row.label for row in chosen] == [label for label in labels for _ in range(2)]
    for row in chosen:
        positive = predictions.labels.numpy() == row.label
        false, true, cuts = sklearn.metrics.roc_curve(
            positive, predictions.probabilities[:, row.label].numpy(), drop_intermediate=False
        )
        specificity = 1 - false
        if row.given == "specificity":
            fits = specificity >= wanted - 1e-12
            assert row.specificity >= wanted - 1e-12
            assert row.sensitivity == pytest.approx(true[fits].max(), abs=1e-12)
        else:
            fits = true >= wanted - 1e-12
            assert row.sensitivity >= wanted - 1e-12
            assert row.specificity == pytest.approx(specificity[fits].max(), abs=1e-12)
        at = np.flatnonzero(cuts == row.threshold)
        assert len(at) == 1
        assert (true[at[0]], specificity[at[0]]) == pytest.approx(
            (row.sensitivity, row.specificity), abs=1e-12
        )


def test_an_example_by_hand() -> None:
    validation = binary([0, 0, 0, 0, 1, 1], [0.125, 0.25, 0.375, 0.75, 0.5, 0.875])
    at_specificity, at_sensitivity = choose_thresholds(
        validation, at_specificity=(0.75,), at_sensitivity=(0.5,)
    )
    assert (at_specificity.threshold, at_specificity.sensitivity) == (0.5, 1.0)
    assert (at_sensitivity.threshold, at_sensitivity.specificity) == (0.875, 1.0)
    # On other images: calls 0.5 and 0.625, of which one is right, and leaves 0.375 and 0.25.
    point = operating_points(binary([0, 1, 1, 0], [0.5, 0.625, 0.375, 0.25]), [at_specificity])[0]
    rates = (point.sensitivity, point.specificity, point.ppv, point.npv)
    assert [rate.estimate for rate in rates] == [0.5, 0.5, 0.5, 0.5]


def test_calling_nothing_may_be_all_that_is_specific_enough() -> None:
    validation = binary([1, 0, 1, 0], [0.25, 0.875, 0.5, 0.125])
    (row,) = choose_thresholds(validation, at_specificity=(1.0,), at_sensitivity=())
    assert (row.threshold, row.sensitivity, row.specificity) == (math.inf, 0.0, 1.0)
    (point,) = operating_points(validation, [row])
    assert (point.sensitivity.estimate, point.specificity.estimate) == (0.0, 1.0)
    assert math.isnan(point.ppv.estimate)
    values = point.to_json()
    assert (values["threshold"], values["ppv"], values["npv"]) == (None, None, 0.5)


def test_intervals_are_those_of_real_resamples() -> None:
    validation, test = make(60, 3, seed=1), make(60, 3, seed=2)
    thresholds = choose_thresholds(validation)
    bootstrap = Bootstrap(test, resamples=200)
    points = operating_points(test, thresholds, bootstrap=bootstrap)
    assert len(points) == 6
    for number, point in enumerate(points):
        drawn = []
        for counts in bootstrap._draws():
            for row in counts:
                again = picked(test, np.repeat(np.arange(60), row))
                drawn.append(operating_points(again, thresholds)[number].sensitivity.estimate)
        low, high = np.quantile(drawn, [0.025, 0.975])
        assert (point.sensitivity.low, point.sensitivity.high) == pytest.approx((low, high))
        if number == 0:
            break


def test_a_class_without_validation_images_has_no_threshold() -> None:
    predictions = make(30, 3)
    labels = torch.where(predictions.labels == 2, 1, predictions.labels)
    without = Predictions(predictions.keys, labels, predictions.logits, predictions.probabilities)
    assert {row.label for row in choose_thresholds(without)} == {0, 1}
    assert operating_points(predictions, ()) == ()


def test_what_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 90"):
        choose_thresholds(make(10, 2), at_specificity=(90.0,))
    with pytest.raises(ValueError, match="a regression has none"):
        choose_thresholds(make_regression(10, 3))
