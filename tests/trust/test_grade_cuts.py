"""Learned cut points between grades, against every other set of cuts there is."""

import itertools
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from fpt_fast.metrics import compute_metrics, halves, predicted_classes
from fpt_fast.records import UNLABELLED, GradeCuts, Predictions
from fpt_fast.trust import assess, fit_grade_cuts


def grades(labels: object, scores: object, cuts: tuple[float, ...] | None = None) -> Predictions:
    values = torch.as_tensor(scores, dtype=torch.float32)[:, None]
    keys = tuple(map(str, range(len(values))))
    return Predictions(keys, torch.as_tensor(labels), values, None, cuts)


def random_grades(seed: int, classes: int, count: int) -> Predictions:
    """Predictions pulled to the middle and moved; every second case is full of ties."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    labels[:2] = (0, classes - 1)
    middle = (classes - 1) / 2
    scores = middle + 0.4 * (labels - middle) + rng.normal(0, 0.5, count) + rng.normal()
    return grades(labels, np.round(scores, 1 if seed % 2 else 6))


def every_set_of_cuts(predictions: Predictions, classes: int) -> list[np.ndarray]:
    """The grades of all images for each ascending set of cuts among the predictions."""
    scores = predictions.logits[:, 0].numpy()
    places = [*np.unique(scores), np.inf]
    sets = itertools.combinations_with_replacement(places, classes - 1)
    return [(scores[:, None] >= np.array(cuts)).sum(axis=1) for cuts in sets]


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("aim", ["kappa", "accuracy"])
def test_no_other_cuts_reach_more(seed: int, aim: GradeCuts) -> None:
    classes = 2 + seed % 4
    predictions = random_grades(seed, classes, count=8 if classes == 5 else 12)
    labels = predictions.labels.numpy()

    def value(graded: np.ndarray) -> float:
        if aim == "accuracy":
            return float((labels == graded).mean())
        chance = np.square(labels[:, None] - graded[None, :]).sum() / len(labels)
        return float(1 - np.square(labels - graded).sum() / chance)

    best = max(value(graded) for graded in every_set_of_cuts(predictions, classes))
    cuts = fit_grade_cuts(predictions, classes, aim)
    assert list(cuts) == sorted(cuts) and len(cuts) == classes - 1
    learned = Predictions(predictions.keys, predictions.labels, predictions.logits, None, cuts)
    assert value(predicted_classes(learned, classes).numpy()) == pytest.approx(best, abs=1e-12)
    graded = predicted_classes(learned, classes).numpy()
    known = list(range(classes))
    kappa = cohen_kappa_score(labels, graded, labels=known, weights="quadratic")
    assert compute_metrics(learned, classes)["kappa"] == pytest.approx(kappa, abs=1e-12)
    assert fit_grade_cuts(predictions, classes, aim) == cuts


def test_cuts_stay_at_the_halves_where_these_are_as_good() -> None:
    right = grades([0, 0, 1, 1, 2, 2], [0.1, 0.4, 0.6, 1.2, 1.9, 2.5])
    assert fit_grade_cuts(right, 3) == (0.5, 1.5)
    assert fit_grade_cuts(right, 3, "accuracy") == (0.5, 1.5)
    # Only the first cut is better elsewhere: in the middle of the two that it keeps apart.
    moved = grades([0, 0, 1, 1, 2, 2], [0.6, 0.7, 0.9, 1.2, 1.9, 2.5])
    assert fit_grade_cuts(moved, 3) == (pytest.approx(0.8), 1.5)
    # Nothing is known of grades that are all alike, and halves were asked for.
    assert fit_grade_cuts(grades([1, 1], [0.1, 1.9]), 4) == halves(4)
    assert fit_grade_cuts(moved, 3, "halves") == halves(3)


def test_unlabelled_images_have_no_part() -> None:
    known = random_grades(3, 3, 20)
    labels = torch.cat([known.labels, torch.full((5,), UNLABELLED)])
    scores = torch.cat([known.logits[:, 0], torch.full((5,), 7.0)])
    assert fit_grade_cuts(grades(labels, scores), 3) == fit_grade_cuts(known, 3)


def test_many_images_take_no_time_that_grows_with_their_square() -> None:
    predictions = random_grades(0, 5, 20_000)
    cuts = fit_grade_cuts(predictions, 5)
    learned = Predictions(predictions.keys, predictions.labels, predictions.logits, None, cuts)
    assert compute_metrics(learned, 5)["kappa"] > compute_metrics(predictions, 5)["kappa"] + 0.1


def test_an_assessment_compares_with_the_halves() -> None:
    plain = random_grades(5, 4, 60)
    cuts = fit_grade_cuts(plain, 4)
    learned = Predictions(plain.keys, plain.labels, plain.logits, None, cuts)
    assessment = assess(learned, 4, resamples=50)
    assert assessment.intervals is not None and assessment.grading is not None
    assert assessment.intervals["kappa"].estimate == pytest.approx(assessment["kappa"])
    assert assessment["kappa"] > assessment.grading.at_halves["kappa"]
    at_halves = compute_metrics(plain, 4)
    written = json.loads(json.dumps(assessment.to_json()))["grade_cuts"]
    assert written["cuts"] == list(cuts)
    assert written["at_halves"]["f1"] == at_halves["f1"]
    assert "cuts" in str(assessment) and "quadratic kappa" in str(assessment)
    assert assess(plain, 4, resamples=0).grading is None


@pytest.mark.parametrize(
    ("cuts", "said"), [((0.5,), "2 ascending points"), ((1.5, 0.5), r"got \(1.5, 0.5\)")]
)
def test_cuts_that_fit_no_grades_are_refused(cuts: tuple[float, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        compute_metrics(grades([0, 1, 2], [0.0, 1.0, 2.0], cuts), 3)


def test_what_has_no_grades_has_no_cuts() -> None:
    logits = torch.zeros(2, 2)
    classes = Predictions(("a", "b"), torch.tensor([0, 1]), logits, logits.softmax(dim=1))
    with pytest.raises(ValueError, match="got probabilities"):
        fit_grade_cuts(classes, 2)
    with pytest.raises(ValueError, match="aim must be one of kappa, accuracy, halves"):
        fit_grade_cuts(grades([0, 1], [0.0, 1.0]), 2, "auc")  # type: ignore[arg-type]
