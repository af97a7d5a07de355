"""The metrics of many resamples of one split at once, each resample given by how often it has
every image.  A row of ones gives what ``fpt_fast.metrics.compute_metrics`` gives."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fpt_fast.metrics import compute_metrics, predicted_classes
from fpt_fast.records import UNLABELLED, Predictions

if TYPE_CHECKING:
    from fpt_fast.trust.resampled_findings import FindingResampler
    from fpt_fast.trust.resampled_values import ValueResampler

Floats = NDArray[np.float64]

CLASS_METRICS = ("precision", "recall", "specificity", "f1", "auc")


@dataclass(frozen=True, slots=True, eq=False)
class ResampledMetrics:
    """Metrics of R resamples: ``values`` [R] by name, ``per_class`` [R, classes] by name.

    Names of ``values`` are those of ``Metrics.values``; of ``per_class`` precision, recall,
    specificity, f1 and auc.  NaN where a resample does not define the metric.
    """

    values: dict[str, Floats]
    per_class: dict[str, Floats]


class Resampler:
    """Computes ``ResampledMetrics`` of ``predictions`` from counts of their labelled images.

    ``value_names`` and ``class_names`` are the names in what it returns.
    Raises ``ValueError`` where ``compute_metrics`` does.
    """

    def __init__(self, predictions: Predictions, num_classes: int) -> None:
        # Raises for everything that cannot be measured.
        self.value_names = tuple(compute_metrics(predictions, num_classes))
        self.class_names = CLASS_METRICS
        labelled = predictions.labels != UNLABELLED
        self.labels: NDArray[np.int64] = predictions.labels[labelled].numpy()
        self._classes = num_classes
        self._cells = (
            num_classes * self.labels
            + predicted_classes(predictions, num_classes)[labelled].numpy()
        )
        logits = predictions.logits[labelled].numpy()
        self._error: Floats | None = None
        self._areas: list[Area] = []
        self._raw_areas: list[Area] = []
        if predictions.probabilities is None:
            self._error = logits[:, 0].astype(np.float64) - self.labels
        else:
            probabilities = predictions.probabilities[labelled].numpy()
            classes = range(num_classes)
            self._areas = [Area(self.labels == c, probabilities[:, c]) for c in classes]
            self._raw_areas = [Area(self.labels == c, logits[:, c]) for c in classes]

    def __call__(self, counts: NDArray[np.int64]) -> ResampledMetrics:
        """Metrics of the resamples ``counts`` [R, labelled images]."""
        expected = len(self.labels)
        if counts.ndim != 2 or counts.shape[1] != expected:
            raise ValueError(
                f"counts must be [resamples, {expected}], one column for each labelled image, "
                f"got shape {counts.shape}"
            )
        weights = counts.astype(np.float64)
        confusion = self._confusion(weights)
        diagonal = np.diagonal(confusion, axis1=1, axis2=2)  # [R, classes]
        support, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
        total = support.sum(axis=1)
        negatives = total[:, None] - support
        per_class = {
            # Without an image of the class, or without another one, there is nothing to estimate.
            "precision": where_known(support, quotient(diagonal, predicted)),
            "recall": where_known(support, quotient(diagonal, support)),
            "specificity": where_known(
                negatives, quotient(negatives - predicted + diagonal, negatives)
            ),
            "f1": where_known(support, quotient(2 * diagonal, predicted + support)),
            "auc": np.full(support.shape, np.nan),
        }
        values: dict[str, Floats] = {}
        if self._error is not None:
            values["mae"] = weights @ np.abs(self._error) / total
            values["mse"] = weights @ np.square(self._error) / total
        else:
            areas = np.stack([area(weights) for area in self._areas], axis=1)
            raw = np.stack([area(weights) for area in self._raw_areas], axis=1)
            per_class["auc"] = areas
            values["auc"] = areas[:, 1] if self._classes == 2 else mean_where_defined(areas)
            values["auc_raw_logits"] = mean_where_defined(raw)
        values["accuracy"] = diagonal.sum(axis=1) / total
        for name in ("f1", "precision", "recall"):
            values[name] = mean_where_defined(per_class[name])
        values["kappa"] = _quadratic_kappa(confusion)
        return ResampledMetrics(values, per_class)

    def _confusion(self, weights: Floats) -> Floats:
        """[R, classes, classes], row: true class."""
        cells = self._classes * self._classes
        one_hot = np.zeros((len(self._cells), cells))
        one_hot[np.arange(len(self._cells)), self._cells] = 1.0
        return (weights @ one_hot).reshape(-1, self._classes, self._classes)


def make_resampler(
    predictions: Predictions, num_classes: int
) -> "Resampler | FindingResampler | ValueResampler":
    """What computes the metrics of resamples, of one class per image, several findings, or a
    number."""
    if predictions.labels.is_floating_point():
        from fpt_fast.trust.resampled_values import ValueResampler

        return ValueResampler(predictions)
    if predictions.labels.dim() == 2:
        from fpt_fast.trust.resampled_findings import FindingResampler

        return FindingResampler(predictions, num_classes)
    return Resampler(predictions, num_classes)


def resampled_metrics(
    predictions: Predictions, num_classes: int, counts: NDArray[np.int64]
) -> ResampledMetrics:
    """Metrics of the resamples ``counts`` [R, labelled images]: how often each image is drawn."""
    return Resampler(predictions, num_classes)(counts)


class Area:
    """Area under the ROC curve of ``scores`` for the images that are ``positive``, by counts.

    Mann and Whitney: the share of pairs of a positive and a negative image that the scores put
    in order, ties by half.  The negatives are sorted once, so that a resample costs one running
    sum and two look-ups for each positive.
    """

    def __init__(self, positive: NDArray[np.bool_], scores: NDArray[np.float32]) -> None:
        negative = np.flatnonzero(~positive)
        order = negative[np.argsort(scores[negative], kind="stable")]
        self._positives = np.flatnonzero(positive)
        self._negatives = order
        self._below = np.searchsorted(scores[order], scores[self._positives], side="left")
        self._not_above = np.searchsorted(scores[order], scores[self._positives], side="right")

    def __call__(self, weights: Floats) -> Floats:
        """[R]; NaN for resamples without a positive or without a negative image."""
        positives = weights[:, self._positives]
        running = np.zeros((len(weights), len(self._negatives) + 1))
        np.cumsum(weights[:, self._negatives], axis=1, out=running[:, 1:])
        ranks = running[:, self._below] + running[:, self._not_above]
        in_order = np.einsum("rp,rp->r", positives, ranks) / 2
        pairs = positives.sum(axis=1) * running[:, -1]
        area: Floats = np.where(pairs > 0, in_order / np.maximum(pairs, 1.0), np.nan)
        return area


def quotient(above: Floats, below: Floats) -> Floats:
    """A ratio with nothing below the line counts as 0, as in ``metrics``."""
    ratio: Floats = np.where(below > 0, above / np.maximum(below, 1.0), 0.0)
    return ratio


def where_known(images: Floats, values: Floats) -> Floats:
    """``values``, NaN where there are no ``images`` to judge by."""
    known: Floats = np.where(images > 0, values, np.nan)
    return known


def mean_where_defined(values: Floats) -> Floats:
    """Mean over classes [R, classes] without the NaN; NaN where all are."""
    defined = np.isfinite(values)
    count = defined.sum(axis=1)
    total = np.where(defined, values, 0.0).sum(axis=1)
    mean: Floats = np.where(count > 0, total / np.maximum(count, 1), math.nan)
    return mean


def _quadratic_kappa(confusion: Floats) -> Floats:
    grades = np.arange(confusion.shape[1], dtype=np.float64)
    distance = np.square(grades[:, None] - grades[None, :])
    support, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    expected = np.einsum("rt,tp,rp->r", support, distance, predicted) / support.sum(axis=1)
    found = np.einsum("rtp,tp->r", confusion, distance)
    kappa: Floats = np.where(
        expected > 0, 1.0 - found / np.where(expected > 0, expected, 1.0), np.nan
    )
    return kappa
