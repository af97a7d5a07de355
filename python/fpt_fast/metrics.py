"""Metrics of predictions, with one policy for classes that a split lacks.

Images without a label are left out.  ``f1``, ``precision``, ``recall`` are macro averages over
the classes with at least one image; ``auc`` is the macro average of one-vs-rest areas over the
classes with at least one image *and* at least one image of another class.  Classes without an
image are named in ``Metrics.missing_classes``, and what could not be computed in
``Metrics.notes``.  A ratio with nothing below the line counts as 0 (scikit-learn's
``zero_division=0``).
"""

import math
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpt_fast.records import UNLABELLED, Predictions

CLASSIFICATION_METRICS = (
    "auc",
    "auc_raw_logits",
    "accuracy",
    "f1",
    "precision",
    "recall",
    "kappa",
)
REGRESSION_METRICS = ("mae", "mse", "accuracy", "f1", "precision", "recall", "kappa")
LOWER_IS_BETTER = frozenset({"loss", "mae", "mse", "rmse"})
# Names for people where the one of a file leaves something open.
_SPOKEN = {"kappa": "quadratic kappa"}


@dataclass(frozen=True, slots=True)
class ClassMetrics:
    """One class against the rest; ``auc`` is NaN unless the split has images of both.

    ``ap``, the average precision, is computed of findings only.
    """

    support: int
    precision: float
    recall: float
    specificity: float
    f1: float
    auc: float
    ap: float = math.nan


@dataclass(frozen=True, slots=True, eq=False)
class Metrics:
    """Metrics of one split: ``metrics["auc"]``, ``dict(metrics)``; all of them in ``values``.

    ``confusion`` [classes, classes] i64 counts images, row: true class, column: predicted class.
    ``missing_classes`` are label numbers without an image; ``notes`` say, in words for a user,
    what is missing and what follows from it.
    """

    values: dict[str, float]
    confusion: Tensor
    per_class: tuple[ClassMetrics, ...]
    missing_classes: tuple[int, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """The values on one line, and the notes below it."""
        line = ", ".join(f"{spoken(name)} {value:.4f}" for name, value in self.values.items())
        return "\n".join([line, *(f"note: {note}" for note in self.notes)])

    def __getitem__(self, name: str) -> float:
        return self.values[name]

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def keys(self) -> KeysView[str]:
        """Names of the metrics, in order."""
        return self.values.keys()

    def items(self) -> ItemsView[str, float]:
        """Names and values, in order."""
        return self.values.items()

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON values, the metrics at the top; NaN and infinity become None."""
        return {
            **{name: finite_or_none(value) for name, value in self.values.items()},
            "confusion": self.confusion.tolist(),
            "per_class": [
                {name: finite_or_none(value) for name, value in asdict(row).items()}
                for row in self.per_class
            ],
            "missing_classes": list(self.missing_classes),
            "notes": list(self.notes),
        }


def spoken(name: str) -> str:
    """A metric's name for people: kappa with its weights."""
    return _SPOKEN.get(name, name)


def finite_or_none(value: float) -> float | None:
    """Return ``value``, or None where JSON has no number for it (NaN, infinities)."""
    return value if math.isfinite(value) else None


def metric_names(
    *, regression: bool = False, findings: bool = False, values: bool = False
) -> tuple[str, ...]:
    """Names in ``compute_metrics(...).values``, in order."""
    if values:
        from fpt_fast.value_metrics import VALUE_METRICS

        return VALUE_METRICS
    if findings:
        from fpt_fast.finding_metrics import FINDING_METRICS

        return FINDING_METRICS
    return REGRESSION_METRICS if regression else CLASSIFICATION_METRICS


def compute_metrics(
    predictions: Predictions, num_classes: int, names: Sequence[str] | None = None
) -> Metrics:
    """Compute all metrics of a split (policy: see the module).

    ``auc`` equals ``sklearn.metrics.roc_auc_score`` on ``predictions.probabilities``: with two
    classes on the probability of class 1, with more as ``multi_class="ovr", average="macro"``.
    ``auc_raw_logits`` is what the authors' code reports: one-vs-rest areas over the columns of
    the logits as they are (with two classes too: the mean over both columns), which ranks
    images on an unnormalised scale; it is here to be compared with published numbers only.
    Labels [images, findings] are of several findings per image: see ``finding_metrics``; those of
    a floating-point dtype are a number per image: see ``value_metrics``.
    Without probabilities the predictions are of a regression, whose ``cuts`` (or halves) give a
    class for ``accuracy``, ``f1``, ``precision``, ``recall``, ``kappa``; no AUC.  ``names`` of the
    classes (their numbers, where not given) are for the notes.

    Raises ``ValueError`` for fewer than two classes, shapes that do not fit, labels out of range,
    logits that are not finite (named by image), or when no image has a label.
    """
    if predictions.labels.is_floating_point():
        from fpt_fast.value_metrics import compute_value_metrics

        return compute_value_metrics(predictions)
    if predictions.labels.dim() == 2:
        from fpt_fast.finding_metrics import compute_finding_metrics

        return compute_finding_metrics(predictions, num_classes, names)
    return _class_metrics(predictions, num_classes, names)


def _class_metrics(
    predictions: Predictions, num_classes: int, names: Sequence[str] | None
) -> Metrics:
    """``compute_metrics`` of one class per image."""
    labels, logits, probabilities = _checked_arrays(predictions, num_classes)
    notes: list[str] = []
    predicted = (
        _grades(logits[:, 0], num_classes, predictions.cuts)
        if probabilities is None
        else probabilities.argmax(axis=1)
    )
    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    present = confusion.sum(axis=1) > 0
    missing = tuple(int(c) for c in np.flatnonzero(~present))
    if missing:
        notes.append(
            f"no image of class {', '.join(named(missing, names))} in this split; "
            "averages are over the classes present"
        )
    auc = np.full(num_classes, np.nan)
    values: dict[str, float] = {}
    if probabilities is None:
        error = logits[:, 0].astype(np.float64) - labels
        values["mae"] = float(np.abs(error).mean())
        values["mse"] = float(np.square(error).mean())
    else:
        auc = _one_vs_rest_auc(labels, probabilities)
        values["auc"] = float(auc[1]) if num_classes == 2 else _mean_of_finite(auc)
        values["auc_raw_logits"] = _mean_of_finite(_one_vs_rest_auc(labels, logits))
        if math.isnan(values["auc"]):
            notes.append("auc is not defined: all images of this split are of one class")
    per_class = _by_class(confusion, auc)
    values["accuracy"] = float(confusion.trace() / confusion.sum())
    for name in ("f1", "precision", "recall"):
        of_classes = np.array([getattr(row, name) for row in per_class])
        values[name] = float(of_classes[present].mean())
    values["kappa"] = _quadratic_kappa(confusion)
    if math.isnan(values["kappa"]):
        notes.append("quadratic kappa is not defined: labels and predictions are all of one class")
    return Metrics(values, torch.from_numpy(confusion), per_class, missing, tuple(notes))


def _by_class(confusion: NDArray[np.int64], auc: NDArray[np.float64]) -> tuple[ClassMetrics, ...]:
    """Each class against the rest."""
    support, called = confusion.sum(axis=1), confusion.sum(axis=0)
    rest = confusion.sum() - support
    precision = _ratio(confusion.diagonal(), called)
    recall = _ratio(confusion.diagonal(), support)
    f1 = _ratio(2 * confusion.diagonal(), called + support)
    specificity = _ratio(rest - called + confusion.diagonal(), rest)
    return tuple(
        ClassMetrics(
            support=int(support[c]),
            precision=float(precision[c]),
            recall=float(recall[c]),
            specificity=float(specificity[c]),
            f1=float(f1[c]),
            auc=float(auc[c]),
        )
        for c in range(len(confusion))
    )


def is_labelled(labels: Tensor) -> Tensor:
    """Which labels are known: those that are not ``UNLABELLED``, of numbers those not NaN."""
    return ~labels.isnan() if labels.is_floating_point() else labels != UNLABELLED


def named(labels: Iterable[int], names: Sequence[str] | None) -> list[str]:
    """Names of ``labels``; their numbers where there are no names."""
    return [str(label) if names is None else names[label] for label in labels]


def predicted_classes(predictions: Predictions, num_classes: int) -> Tensor:
    """Predicted label of each image, [images] i64: most probable class, or grade by the cuts.

    Of several findings per image: 1 where one is called, at a probability of 0.5, [images, F].
    """
    if predictions.labels.dim() == 2 and predictions.probabilities is not None:
        return (predictions.probabilities >= 0.5).long()
    if predictions.probabilities is not None:
        return predictions.probabilities.argmax(dim=1)
    values = predictions.logits[:, 0].numpy()
    return torch.from_numpy(_grades(values, num_classes, predictions.cuts))


def halves(num_classes: int) -> tuple[float, ...]:
    """The cut points between grades where none were learned: 0.5, 1.5, ..."""
    return tuple(grade + 0.5 for grade in range(num_classes - 1))


def _checked_arrays(
    predictions: Predictions, num_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]:
    """Labels, logits and probabilities of the labelled images, or a ``ValueError``."""
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    count = len(predictions.keys)
    outputs = 1 if predictions.probabilities is None else num_classes
    for name, value, shape in (
        ("labels", predictions.labels, (count,)),
        ("logits", predictions.logits, (count, outputs)),
        ("probabilities", predictions.probabilities, (count, outputs)),
    ):
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"predictions.{name} must be {shape} for {count} images and {num_classes} "
                f"classes, got {tuple(value.shape)}"
            )
    finite = predictions.logits.isfinite().all(dim=1)
    if not bool(finite.all()):
        bad = [key for key, ok in zip(predictions.keys, finite.tolist(), strict=True) if not ok]
        raise ValueError(
            f"logits must be finite, got NaN or infinity for {len(bad)} of {count} images, first "
            f"{bad[0]!r}: check its features (`fpt-fast cache verify`) and the training loss"
        )
    labelled = predictions.labels != UNLABELLED
    if not bool(labelled.any()):
        raise ValueError(f"metrics need labelled images, got {count} images without a label")
    labels = predictions.labels[labelled].numpy()
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in 0..{num_classes - 1}, got {labels.min()}..{labels.max()}"
        )
    probabilities = predictions.probabilities
    return (
        labels,
        predictions.logits[labelled].numpy(),
        None if probabilities is None else probabilities[labelled].numpy(),
    )


def _one_vs_rest_auc(labels: NDArray[np.int64], scores: NDArray[np.float32]) -> NDArray[np.float64]:
    """Area under the ROC curve of each column against the rest, NaN where it has no meaning."""
    # scikit-learn brings scipy, a second of import that only metrics need.
    from sklearn.metrics import roc_auc_score

    areas = np.full(scores.shape[1], np.nan)
    for column in range(scores.shape[1]):
        positive = labels == column
        if positive.any() and not positive.all():
            areas[column] = roc_auc_score(positive, scores[:, column])
    return areas


def _quadratic_kappa(confusion: NDArray[np.int64]) -> float:
    """Cohen's kappa with quadratic weights; NaN where chance agreement is complete."""
    grades = np.arange(len(confusion))
    weights = np.square(grades[:, None] - grades[None, :]).astype(np.float64)
    expected = np.outer(confusion.sum(axis=1), confusion.sum(axis=0)) / confusion.sum()
    disagreement = float((weights * expected).sum())
    if disagreement == 0.0:
        return math.nan
    return 1.0 - float((weights * confusion).sum()) / disagreement


def _ratio(above: NDArray[np.int64], below: NDArray[np.int64]) -> NDArray[np.float64]:
    ratio: NDArray[np.float64] = np.where(below > 0, above / np.maximum(below, 1), 0.0)
    return ratio


def _mean_of_finite(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else math.nan


def _grades(
    values: NDArray[np.float32], num_classes: int, cuts: tuple[float, ...] | None
) -> NDArray[np.int64]:
    """How many cuts each value reaches: at a cut the higher grade, as in the authors' code."""
    cuts = halves(num_classes) if cuts is None else cuts
    if len(cuts) != num_classes - 1 or list(cuts) != sorted(cuts):
        raise ValueError(
            f"cuts must be {num_classes - 1} ascending points between {num_classes} grades, "
            f"got {cuts}"
        )
    return np.searchsorted(np.array(cuts), values.astype(np.float64), side="right").astype(np.int64)
