"""Calibration against scikit-learn and scipy, on probabilities that are known to be false."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import sklearn.calibration
import sklearn.linear_model
import sklearn.metrics
import torch
from trust.samples import make, make_regression, picked, scaled

from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.trust import (
    Bootstrap,
    assess,
    calibration_errors,
    finding_temperatures,
    fit_temperature,
    scale_probabilities,
    usable_temperature,
)
from fpt_fast.trust.calibration import FEW


@pytest.mark.parametrize("classes", [2, 3, 6])
@pytest.mark.parametrize("factor", [0.3, 1.0, 8.0])
def test_the_temperature_is_where_scipy_finds_the_least_loss(classes: int, factor: float) -> None:
    predictions = scaled(make(300, classes, seed=classes), factor)
    labels, logits = predictions.labels.numpy(), predictions.logits.numpy().astype(np.float64)

    def loss(inverse: float) -> float:
        return float(sklearn.metrics.log_loss(labels, scipy.special.softmax(inverse * logits, 1)))

    best = scipy.optimize.minimize_scalar(loss, (0.01, 1.0), tol=1e-12)
    # A minimum is flat: scipy finds its place to the root of the rounding only.
    ours = fit_temperature(predictions)
    assert 1 / ours == pytest.approx(best.x, rel=1e-6)
    assert loss(1 / ours) <= best.fun + 1e-13


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_of_two_classes_it_is_a_logistic_regression_without_intercept(factor: float) -> None:
    predictions = scaled(make(400, 2, seed=7), factor)
    margin = (predictions.logits[:, 1] - predictions.logits[:, 0]).double()[:, None].numpy()
    fitted = sklearn.linear_model.LogisticRegression(
        C=np.inf, fit_intercept=False, tol=1e-12, solver="newton-cholesky"
    ).fit(margin, predictions.labels.numpy())
    assert 1 / fit_temperature(predictions) == pytest.approx(float(fitted.coef_[0, 0]), rel=1e-6)


def test_scaling_undoes_a_factor() -> None:
    predictions = make(500, 4)
    plain = fit_temperature(predictions)
    assert fit_temperature(scaled(predictions, 8.0)) == pytest.approx(8 * plain, rel=1e-6)
    back = scale_probabilities(scaled(predictions, 8.0), 8.0)
    assert predictions.probabilities is not None
    torch.testing.assert_close(back.probabilities, predictions.probabilities)


def test_all_right_and_no_better_than_chance_take_the_ends() -> None:
    labels = torch.arange(10) % 2
    logits = torch.nn.functional.one_hot(labels, 2).float()
    keys = tuple(map(str, range(10)))
    assert fit_temperature(Predictions(keys, labels, logits, logits.softmax(1))) == 0.01
    wrong = Predictions(keys, 1 - labels, logits, logits.softmax(1))
    assert fit_temperature(wrong) == 100.0 and usable_temperature(wrong) is None


def test_a_temperature_that_every_image_asks_to_be_lower_is_not_used() -> None:
    labels = torch.arange(10) % 2
    logits = torch.nn.functional.one_hot(labels, 2).float()
    right = Predictions(tuple(map(str, range(10))), labels, logits, logits.softmax(1))
    assert usable_temperature(right) is None
    assessment = assess(make(50, 2), 2, validation=right, resamples=50)
    calibration = assessment.calibration
    assert calibration is not None and calibration.scaled is None
    assert "calibrated probabilities are the plain ones" in str(assessment)
    findings = Predictions(right.keys, labels[:, None], 2 * labels[:, None].float() - 1, None)
    assert finding_temperatures(findings) == (None,)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_errors_are_those_of_scikit_learn(classes: int, temperature: float) -> None:
    predictions = scaled(make(250, classes, seed=3), 4.0)
    ours = calibration_errors(predictions, temperature=temperature)
    labels = predictions.labels.numpy()
    probabilities = scipy.special.softmax(
        predictions.logits.numpy().astype(np.float64) / temperature, axis=1
    )
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    true, predicted = sklearn.calibration.calibration_curve(right, confidence, n_bins=15)
    rows = [row for row in ours.bins if row.images]
    assert [row.accuracy for row in rows] == pytest.approx(true.tolist(), abs=1e-12)
    assert [row.confidence for row in rows] == pytest.approx(predicted.tolist(), abs=1e-12)
    ece = sum(r.images * abs(t - p) for r, t, p in zip(rows, true, predicted, strict=True)) / 250
    assert ours.ece.estimate == pytest.approx(ece, abs=1e-9)
    assert ours.nll.estimate == pytest.approx(
        sklearn.metrics.log_loss(labels, probabilities), abs=1e-9
    )
    one_hot = np.eye(classes)[labels]
    brier = classes * sklearn.metrics.mean_squared_error(one_hot, probabilities)
    assert ours.brier.estimate == pytest.approx(brier, abs=1e-9)


def test_confidence_one_is_in_the_last_bin() -> None:
    logits = torch.tensor([[200.0, 0.0], [0.0, 200.0], [0.0, 0.0]])
    predictions = Predictions(("a", "b", "c"), torch.tensor([0, 0, 0]), logits, logits.softmax(1))
    bins = calibration_errors(predictions).bins
    assert (bins[-1].images, bins[-1].accuracy, bins[-1].confidence) == (2, 0.5, 1.0)
    assert sum(row.images for row in bins) == 3


def test_intervals_hold_each_error_of_real_resamples() -> None:
    predictions = scaled(make(80, 3), 3.0)
    bootstrap = Bootstrap(predictions, resamples=300, level=0.9)
    ours = calibration_errors(predictions, bootstrap=bootstrap)
    drawn = []
    for counts in bootstrap._draws():
        for row in counts:
            again = picked(predictions, np.repeat(np.arange(80), row))
            errors = calibration_errors(again)
            drawn.append([errors.ece.estimate, errors.nll.estimate, errors.brier.estimate])
    low, high = np.quantile(np.array(drawn), [0.05, 0.95], axis=0)
    got = [ours.ece, ours.nll, ours.brier]
    assert [row.low for row in got] == pytest.approx(low.tolist(), abs=1e-12)
    assert [row.high for row in got] == pytest.approx(high.tolist(), abs=1e-12)


def test_temperature_of_validation_mends_overconfidence_on_test() -> None:
    validation, test = scaled(make(2000, 3, seed=1), 6.0), scaled(make(2000, 3, seed=2), 6.0)
    calibration = assess(test, 3, validation=validation, resamples=50).calibration
    assert calibration is not None and calibration.scaled is not None
    assert calibration.plain.ece.estimate > 0.2
    assert calibration.scaled.ece.estimate < 0.04
    assert calibration.temperature == fit_temperature(validation)
    alone = assess(test, 3, resamples=0).calibration
    assert alone is not None and (alone.temperature, alone.scaled) == (None, None)
    assert alone.plain.ece.estimate == calibration.plain.ece.estimate


@pytest.mark.parametrize(("count", "few"), [(FEW, False), (FEW - 1, True)])
def test_a_temperature_of_few_images_is_told(count: int, few: bool) -> None:
    validation = scaled(make(count + 3, 3, seed=1), 6.0)
    unknown = torch.cat((validation.labels[:-3], torch.full((3,), UNLABELLED)))
    assessment = assess(
        make(50, 3), 3, validation=replace(validation, labels=unknown), resamples=20
    )
    said = f"the temperature is of {count} validation images: with fewer than {FEW}"
    assert (said in str(assessment)) == few


def test_what_has_no_calibration() -> None:
    with pytest.raises(ValueError, match="a regression has none"):
        fit_temperature(make_regression(10, 3))
    with pytest.raises(ValueError, match="no probabilities to scale"):
        scale_probabilities(make_regression(10, 3), 2.0)
    assert assess(make_regression(10, 3), 3, resamples=0).calibration is None
    known = make(10, 2)
    nobody = Predictions(
        known.keys, torch.full((10,), UNLABELLED), known.logits, known.probabilities
    )
    with pytest.raises(ValueError, match="10 without a label"):
        fit_temperature(nobody)
    assert assess(known, 2, validation=nobody, resamples=0).points == ()
