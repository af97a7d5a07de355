"""The metrics of many resamples at once, of several findings per image.  A row of ones gives what
``fpt_fast.metrics.compute_metrics`` gives."""

import numpy as np
from numpy.typing import NDArray

from fpt_fast.metrics import compute_metrics
from fpt_fast.records import Predictions
from fpt_fast.trust.resampled import (
    CLASS_METRICS,
    Area,
    Floats,
    ResampledMetrics,
    quotient,
    where_known,
)

Truth = NDArray[np.bool_]


class FindingResampler:
    """As ``Resampler``, for labels [images, findings]; all images are drawn from."""

    def __init__(self, predictions: Predictions, num_findings: int) -> None:
        self.value_names = tuple(compute_metrics(predictions, num_findings))
        self.class_names = (*CLASS_METRICS, "ap")
        assert predictions.probabilities is not None
        self.labels: NDArray[np.int64] = predictions.labels.numpy()
        scores = predictions.probabilities.numpy()
        self._positive, self._negative = self.labels == 1, self.labels == 0
        self._called = scores >= 0.5
        self._whole = (self.labels >= 0).all(axis=1)
        with_it, without = self._positive.any(axis=0), self._negative.any(axis=0)
        self._defined = {
            "accuracy": with_it | without,
            **dict.fromkeys(("auc", "ap"), with_it & without),
            **dict.fromkeys(("f1", "precision", "recall"), with_it),
        }
        self._areas = [_KnownArea(self.labels[:, f], scores[:, f]) for f in range(num_findings)]
        self._precisions = [
            _AveragePrecision(self.labels[:, f], scores[:, f]) for f in range(num_findings)
        ]

    def __call__(self, counts: NDArray[np.int64]) -> ResampledMetrics:
        """Metrics of the resamples ``counts`` [R, images]."""
        weights = counts.astype(np.float64)
        support, rest = weights @ self._positive, weights @ self._negative  # [R, findings]
        hits = weights @ (self._positive & self._called)
        calm = weights @ (self._negative & ~self._called)
        called = hits + rest - calm
        per_class = {
            "precision": where_known(support, quotient(hits, called)),
            "recall": where_known(support, quotient(hits, support)),
            "specificity": where_known(rest, quotient(calm, rest)),
            "f1": where_known(support, quotient(2 * hits, called + support)),
            "auc": np.stack([area(weights) for area in self._areas], axis=1),
            "ap": np.stack([value(weights) for value in self._precisions], axis=1),
        }
        told = support + rest
        right = np.where(told > 0, (hits + calm) / np.maximum(told, 1.0), np.nan)
        values = {"accuracy": self._average("accuracy", right)}
        for name in ("auc", "ap", "f1", "precision", "recall"):
            values[name] = self._average(name, per_class[name])
        agree: Truth = np.equal(self._positive, self._called)
        exact = agree.all(axis=1) & self._whole
        whole = weights @ self._whole
        values["exact_match"] = np.where(
            whole > 0, (weights @ exact) / np.maximum(whole, 1.0), np.nan
        )
        return ResampledMetrics(values, per_class)

    def _average(self, name: str, by_finding: Floats) -> Floats:
        """Over the same findings in every resample, those that the images themselves define
        ``name`` for: NaN [R] where a resample lacks one, or it would be the average of others."""
        defined = self._defined[name]
        if not defined.any():
            return np.full(len(by_finding), np.nan)
        average: Floats = by_finding[:, defined].mean(axis=1)
        return average


class _KnownArea:
    """Area under the ROC curve of a finding, of the images that it is known of."""

    def __init__(self, labels: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        self._known = np.flatnonzero(labels >= 0)
        self._area = Area(labels[self._known] == 1, scores[self._known])

    def __call__(self, weights: Floats) -> Floats:
        return self._area(weights[:, self._known])


class _AveragePrecision:
    """Precision at each positive image, ties counted together, averaged by counts."""

    def __init__(self, labels: NDArray[np.int64], scores: NDArray[np.float32]) -> None:
        known = np.flatnonzero(labels >= 0)
        self._order = known[np.argsort(-scores[known], kind="stable")]
        sorted_scores = scores[self._order]
        # Where a run of equal scores ends: an image is called with all that have its score.
        self._ends = np.flatnonzero(np.append(np.diff(sorted_scores) != 0, True))
        self._positive = (labels[self._order] == 1).astype(np.float64)

    def __call__(self, weights: Floats) -> Floats:
        """[R]; NaN for resamples without a positive or without a negative image."""
        if not len(self._order):
            return np.full(len(weights), np.nan)
        drawn = weights[:, self._order]
        called = np.cumsum(drawn, axis=1)[:, self._ends]
        hits = np.cumsum(drawn * self._positive, axis=1)[:, self._ends]
        gained = np.diff(hits, axis=1, prepend=0.0)
        total = hits[:, -1]
        both = (total > 0) & (total < called[:, -1])
        summed = (gained * quotient(hits, called)).sum(axis=1)
        average: Floats = np.where(both, summed / np.maximum(total, 1.0), np.nan)
        return average
