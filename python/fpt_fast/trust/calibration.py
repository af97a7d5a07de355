"""Are the probabilities true?  Calibration errors, reliability diagrams and temperature scaling.

Sources: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (temperature scaling and
the expected calibration error over equal bins of the confidence, 15 of them); Brier (1950).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fpt_fast.metrics import finite_or_none
from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.trust.bootstrap import Bootstrap, Interval
from fpt_fast.trust.resampled import Floats

BINS = 15
# Below this many validation images, our own choice, a temperature may say more of them than of the
# model: a dozen that it happens to have right ask for a very low one.
FEW = 50
_LOWEST, _HIGHEST = 0.01, 100.0
_AT_A_BOUND = {
    _LOWEST: "every validation image is right",
    _HIGHEST: "on the validation images they are no better than chance",
}
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, slots=True)
class ReliabilityBin:
    """Images whose confidence lies in ``(low, high]``: how many, their mean confidence and the
    share of them that is right (NaN without images)."""

    low: float
    high: float
    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class CalibrationErrors:
    """Expected calibration error, mean negative log-likelihood, Brier score (its sum over the
    classes), each with an interval where a bootstrap was given, and the reliability bins."""

    ece: Interval
    nll: Interval
    brier: Interval
    bins: tuple[ReliabilityBin, ...]

    def to_json(self) -> dict[str, Any]:
        """The errors, their intervals and the bins, as JSON values."""
        named = {"ece": self.ece, "nll": self.nll, "brier": self.brier}
        return {
            **{name: finite_or_none(value.estimate) for name, value in named.items()},
            "intervals": {name: value.to_json() for name, value in named.items()},
            "bins": [
                {
                    "low": row.low,
                    "high": row.high,
                    "images": row.images,
                    "confidence": finite_or_none(row.confidence),
                    "accuracy": finite_or_none(row.accuracy),
                }
                for row in self.bins
            ],
        }


@dataclass(frozen=True, slots=True)
class Calibration:
    """Errors of the probabilities as they are, and ``scaled`` by a ``temperature`` that was fitted
    on validation images, ``fitted_on`` of them (None without any; ``scaled`` None where all of
    those are right)."""

    plain: CalibrationErrors
    temperature: float | None
    scaled: CalibrationErrors | None
    fitted_on: int | None = None

    @property
    def warning(self) -> str | None:
        """Why the temperature is none that was fitted, since it lies on a bound; or that it was
        fitted on few images."""
        if self.temperature == _HIGHEST:
            return (
                "no temperature helps: on the validation images the probabilities are no better "
                "than chance; calibrated probabilities are the plain ones"
            )
        if self.temperature == _LOWEST:
            return (
                "no temperature was found, since every validation image is right: calibrated "
                "probabilities are the plain ones"
            )
        if self.fitted_on is not None and self.fitted_on < FEW:
            images = "image" if self.fitted_on == 1 else "images"
            return (
                f"the temperature is of {self.fitted_on} validation {images}: with fewer than "
                f"{FEW} it may say more of them than of the model"
            )
        return None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "temperature": self.temperature,
            "plain": self.plain.to_json(),
            "scaled": None if self.scaled is None else self.scaled.to_json(),
        }


def fit_temperature(predictions: Predictions) -> float:
    """The temperature ``T`` for which ``softmax(logits / T)`` explains the labels best.

    Minimises the mean negative log-likelihood, which is convex in ``1 / T``, to 1e-9 of ``1 / T``;
    ``T`` stays in 0.01..100, whose ends it takes where every image is right, or labels are no
    better than chance.  Raises ``ValueError`` for a regression or without labelled images.
    """
    labels, logits = _labelled(predictions)
    rows = np.arange(len(labels))
    own = logits[rows, labels]

    def slopes(inverse: float) -> tuple[float, float]:
        """First and second derivative of the likelihood by ``1 / T``."""
        weights = _softmax(inverse * logits)
        mean = (weights * logits).sum(axis=1)
        variance = (weights * np.square(logits - mean[:, None])).sum(axis=1)
        return float((mean - own).mean()), float(variance.mean())

    low, high = 1 / _HIGHEST, 1 / _LOWEST
    if slopes(low)[0] >= 0:
        return _HIGHEST
    if slopes(high)[0] <= 0:
        return _LOWEST
    inverse = 1.0
    for _ in range(200):
        slope, curvature = slopes(inverse)
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.nan
        # Newton's step, and halves of the bracket where it would leave it.
        following = step if low < step < high else (low + high) / 2
        if abs(following - inverse) <= 1e-9 * inverse:
            inverse = following
            break
        inverse = following
    return 1 / inverse


def usable_temperature(predictions: Predictions) -> float | None:
    """``fit_temperature``, or None at a bound.  Where every image is right, the lower it were the
    better, down to probabilities of 0 and 1, which a few images do not warrant; where the
    probabilities are no better than chance, the higher, until all are alike."""
    temperature = fit_temperature(predictions)
    return None if temperature in _AT_A_BOUND else temperature


def why_no_temperature(predictions: Predictions) -> str | None:
    """Why ``usable_temperature`` of validation images is None; None where it is a number."""
    return _AT_A_BOUND.get(fit_temperature(predictions))


def scale_probabilities(predictions: Predictions, temperature: float) -> Predictions:
    """``predictions`` with probabilities ``softmax(logits / temperature)``."""
    if predictions.probabilities is None:
        raise ValueError("a regression has no probabilities to scale")
    scaled = torch.softmax(predictions.logits.double() / temperature, dim=1).float()
    return Predictions(predictions.keys, predictions.labels, predictions.logits, scaled)


def calibration_errors(
    predictions: Predictions,
    *,
    temperature: float = 1.0,
    bootstrap: Bootstrap | None = None,
) -> CalibrationErrors:
    """Errors of the labelled images' probabilities, ``softmax(logits / temperature)``.

    The expected calibration error is the mean over images of |accuracy - confidence| of their
    bin, of 15 equal bins of the largest probability, each open below and closed above.
    """
    labels, logits = _labelled(predictions)
    probabilities = _softmax(logits / temperature)
    rows = np.arange(len(labels))
    confidence = probabilities.max(axis=1)
    right = (probabilities.argmax(axis=1) == labels).astype(np.float64)
    edges = np.linspace(0.0, 1.0, BINS + 1)
    bin_of = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, BINS - 1)
    gap = np.zeros((len(labels), BINS))  # what an image adds to its bin's gap
    gap[rows, bin_of] = right - confidence
    nll = -np.log(np.maximum(probabilities[rows, labels], _TINY))
    target = np.zeros_like(probabilities)
    target[rows, labels] = 1.0
    brier = np.square(probabilities - target).sum(axis=1)

    def errors(counts: NDArray[np.int64]) -> Floats:  # [R, 3]
        weights = counts / counts.sum(axis=1, keepdims=True)
        ece = np.abs(weights @ gap).sum(axis=1)
        return np.stack([ece, weights @ nll, weights @ brier], axis=1)

    if bootstrap is None:
        values = errors(np.ones((1, len(labels)), dtype=np.int64))[0]
        intervals = tuple(Interval(float(value), math.nan, math.nan) for value in values)
    else:
        intervals, _ = bootstrap.intervals(errors)
    ece, mean_nll, mean_brier = intervals
    return CalibrationErrors(ece, mean_nll, mean_brier, _bins(edges, bin_of, confidence, right))


def _bins(
    edges: Floats, bin_of: NDArray[np.int64], confidence: Floats, right: Floats
) -> tuple[ReliabilityBin, ...]:
    rows = []
    for number, (low, high) in enumerate(pairwise(edges.tolist())):
        inside = bin_of == number
        images = int(inside.sum())
        mean, share = math.nan, math.nan
        if images:
            mean, share = float(confidence[inside].mean()), float(right[inside].mean())
        rows.append(ReliabilityBin(low, high, images, mean, share))
    return tuple(rows)


def _labelled(predictions: Predictions) -> tuple[NDArray[np.int64], Floats]:
    """Labels, and logits in f64, of the labelled images."""
    if predictions.probabilities is None:
        raise ValueError("calibration is of probabilities; a regression has none")
    labelled = predictions.labels != UNLABELLED
    if not bool(labelled.any()):
        raise ValueError(
            f"calibration needs labelled images, got {len(predictions.keys)} without a label"
        )
    logits: Floats = predictions.logits[labelled].numpy().astype(np.float64)
    return predictions.labels[labelled].numpy(), logits


def _softmax(logits: Floats) -> Floats:
    weights: Floats = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return weights
