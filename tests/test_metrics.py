"""Metrics against scikit-learn, and the policy for classes that a split lacks."""

import json
import math

import numpy as np
import pytest
import sklearn.metrics
import torch

from fpt_fast.metrics import (
    CLASSIFICATION_METRICS,
    REGRESSION_METRICS,
    compute_metrics,
    metric_names,
    predicted_classes,
)
from fpt_fast.records import UNLABELLED, Predictions


def make(labels: list[int] | np.ndarray, logits: object) -> Predictions:
    values = torch.as_tensor(logits, dtype=torch.float32)
    keys = tuple(f"{i}.png" for i in range(len(values)))
    return Predictions(keys, torch.as_tensor(labels), values, values.softmax(dim=1))


def make_regression(labels: list[int], grades: list[float]) -> Predictions:
    keys = tuple(map(str, range(len(labels))))
    return Predictions(keys, torch.tensor(labels), torch.tensor(grades)[:, None], None)


def random_case(seed: int, classes: int, *, present: int | None = None) -> Predictions:
    """Random labels of the first ``present`` classes; every third case is full of ties."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(present or classes, 60)) + classes
    labels = rng.integers(0, present or classes, count)
    labels[: present or classes] = np.arange(present or classes)
    logits = rng.normal(size=(count, classes)) * rng.choice([0.1, 1.0, 30.0])
    logits[np.arange(count), labels] += rng.uniform(0, 2)
    if seed % 3 == 0:
        logits = np.round(logits)
    return make(labels, logits)


@pytest.mark.parametrize("seed", range(60))
def test_auc_equals_scikit_learn(seed: int) -> None:
    classes = 2 + seed % 5
    predictions = random_case(seed, classes)
    assert predictions.probabilities is not None
    probabilities = predictions.probabilities.numpy()
    expected = sklearn.metrics.roc_auc_score(
        predictions.labels.numpy(),
        probabilities[:, 1] if classes == 2 else probabilities,
        multi_class="ovr",
        average="macro",
    )
    assert compute_metrics(predictions, classes)["auc"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_other_metrics_equal_scikit_learn_over_the_classes_present(seed: int) -> None:
    classes = 3 + seed % 4
    present = classes - seed % 2
    predictions = random_case(seed, classes, present=present)
    metrics = compute_metrics(predictions, classes)
    labels, predicted = predictions.labels.numpy(), predictions.logits.argmax(dim=1).numpy()
    options = {"labels": range(present), "average": "macro", "zero_division": 0}
    expected = {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "f1": sklearn.metrics.f1_score(labels, predicted, **options),
        "precision": sklearn.metrics.precision_score(labels, predicted, **options),
        "recall": sklearn.metrics.recall_score(labels, predicted, **options),
        "kappa": sklearn.metrics.cohen_kappa_score(
            labels, predicted, labels=range(classes), weights="quadratic"
        ),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    confusion = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(classes))
    assert metrics.confusion.tolist() == confusion.tolist()
    rows = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=range(classes), zero_division=0
    )
    for column, name in enumerate(("precision", "recall", "f1", "support")):
        assert [getattr(row, name) for row in metrics.per_class] == pytest.approx(rows[column])


@pytest.mark.parametrize("seed", range(20))
def test_auc_with_missing_classes_is_over_those_present(seed: int) -> None:
    classes = 4 + seed % 3
    present = 2 + seed % 2
    predictions = random_case(seed, classes, present=present)
    assert predictions.probabilities is not None
    metrics = compute_metrics(predictions, classes)
    areas = [
        sklearn.metrics.roc_auc_score(predictions.labels == c, predictions.probabilities[:, c])
        for c in range(present)
    ]
    assert metrics["auc"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert [row.auc for row in metrics.per_class[:present]] == pytest.approx(areas)
    assert all(math.isnan(row.auc) for row in metrics.per_class[present:])
    assert metrics.missing_classes == tuple(range(present, classes))
    assert f"no image of class {', '.join(map(str, range(present, classes)))}" in metrics.notes[0]


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_one_class_only_has_no_auc_and_says_so(classes: int) -> None:
    predictions = make([1, 1, 1], torch.eye(classes)[[1, 0, 1]])
    metrics = compute_metrics(predictions, classes)
    assert math.isnan(metrics["auc"])
    assert math.isnan(metrics["auc_raw_logits"])
    assert metrics["accuracy"] == metrics["recall"] == pytest.approx(2 / 3)
    assert any("auc is not defined" in note for note in metrics.notes)
    text = json.dumps(metrics.to_json(), allow_nan=False)
    assert json.loads(text)["auc"] is None


def test_all_right_in_one_class_has_no_kappa() -> None:
    metrics = compute_metrics(make([0, 0], [[2.0, 0.0], [1.0, 0.0]]), 2)
    assert math.isnan(metrics["kappa"])
    assert metrics["accuracy"] == 1.0
    assert any("kappa is not defined" in note for note in metrics.notes)


def test_raw_logits_rank_on_an_unnormalised_scale() -> None:
    # The second image's logits are all higher: probabilities rank right, raw logits do not.
    predictions = make([1, 0], [[0.0, 1.0], [10.0, 9.0]])
    metrics = compute_metrics(predictions, 2)
    assert metrics["auc"] == 1.0
    # Column 1 ranks the wrong one first, column 0 the right one: as published, their mean.
    columns = [
        sklearn.metrics.roc_auc_score([1, 0], predictions.logits[:, 1]),
        sklearn.metrics.roc_auc_score([0, 1], predictions.logits[:, 0]),
    ]
    assert metrics["auc_raw_logits"] == np.mean(columns) == 0.5


@pytest.mark.parametrize("seed", range(10))
def test_raw_logits_are_one_vs_rest_over_columns(seed: int) -> None:
    classes = 2 + seed % 3
    predictions = random_case(seed, classes)
    areas = [
        sklearn.metrics.roc_auc_score(predictions.labels == c, predictions.logits[:, c])
        for c in range(classes)
    ]
    metrics = compute_metrics(predictions, classes)
    assert metrics["auc_raw_logits"] == pytest.approx(np.mean(areas), abs=1e-12)


def test_regression() -> None:
    labels, grades = [0, 1, 2, 2, 1], [-3.0, 1.5, 2.4, 9.0, 0.4]
    predictions = make_regression(labels, grades)
    assert predicted_classes(predictions, 3).tolist() == [0, 2, 2, 2, 0]
    metrics = compute_metrics(predictions, 3)
    errors = np.subtract(grades, labels)
    assert metrics["mae"] == pytest.approx(np.abs(errors).mean(), rel=1e-6)
    assert metrics["mse"] == pytest.approx((errors**2).mean(), rel=1e-6)
    assert metrics["accuracy"] == pytest.approx(3 / 5)
    assert metrics["kappa"] == pytest.approx(
        sklearn.metrics.cohen_kappa_score(labels, [0, 2, 2, 2, 0], weights="quadratic")
    )
    assert "auc" not in metrics
    assert tuple(metrics) == REGRESSION_METRICS == metric_names(regression=True)


def test_images_without_a_label_are_left_out() -> None:
    whole = random_case(5, 3)
    labels = torch.cat([whole.labels, torch.tensor([UNLABELLED])])
    more = make(labels, torch.cat([whole.logits, torch.zeros(1, 3)]))
    assert compute_metrics(more, 3).to_json() == compute_metrics(whole, 3).to_json()


def test_reads_like_a_dict() -> None:
    metrics = compute_metrics(random_case(1, 3), 3)
    assert tuple(metrics) == tuple(metrics.keys()) == CLASSIFICATION_METRICS == metric_names()
    assert dict(metrics) == dict(metrics.items()) == metrics.values
    assert len(metrics) == 7
    assert "auc" in metrics
    assert "mae" not in metrics


@pytest.mark.parametrize(
    ("predictions", "classes", "match"),
    [
        (make([0], [[0.0]]), 1, "at least 2, got 1"),
        (make([0, 1], [[0.0, 1.0, 2.0]] * 2), 2, r"logits must be \(2, 2\).*got \(2, 3\)"),
        (make([0], [[0.0, 1.0]] * 2), 2, r"labels must be \(2,\).*got \(1,\)"),
        (make([0, 2], [[0.0, 1.0]] * 2), 2, r"in 0..1, got 0..2"),
        (make([0, -2], [[0.0, 1.0]] * 2), 2, r"in 0..1, got -2..0"),
        (make([-1, -1], [[0.0, 1.0]] * 2), 2, "2 images without a label"),
        (make([0, 1], [[0.0, 1.0], [math.nan, 0.0]]), 2, r"1 of 2 images, first '1\.png'"),
        (make([0, 1], [[math.inf, 1.0], [0.0, 0.0]]), 2, r"first '0\.png'"),
    ],
)
def test_what_cannot_be_measured(predictions: Predictions, classes: int, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compute_metrics(predictions, classes)


def test_metrics_as_text() -> None:
    predictions = make([0, 1, 0], [[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.5]])
    text = str(compute_metrics(predictions, 3))
    assert text.splitlines()[0].startswith("auc 1.0000, auc_raw_logits")
    assert any(line.startswith("note: ") for line in text.splitlines()[1:])
