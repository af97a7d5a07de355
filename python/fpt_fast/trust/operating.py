"""Operating points: where to cut a class's probability, and what that gives on new images.

A threshold is chosen on validation images, and judged on others: a sensitivity "at 90 %
specificity" whose threshold was chosen on the very images it is reported for is too good.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fpt_fast.metrics import finite_or_none
from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.trust.bootstrap import Bootstrap, Interval
from fpt_fast.trust.resampled import Floats

Given = Literal["sensitivity", "specificity"]
_SENSITIVITY: Given = "sensitivity"
_SPECIFICITY: Given = "specificity"


@dataclass(frozen=True, slots=True)
class Threshold:
    """Call an image of class ``label`` where its probability is at least ``threshold``.

    Chosen so that ``given`` is at least ``wanted`` on the validation images, where the rates are
    ``sensitivity`` and ``specificity``; infinite where only calling nothing reaches it.
    """

    label: int
    given: Given
    wanted: float
    threshold: float
    sensitivity: float
    specificity: float


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """A threshold, and its rates on the images of a split; ``ppv`` and ``npv`` are predictive
    values at the split's own prevalence (NaN where nothing is called, or everything)."""

    chosen: Threshold
    sensitivity: Interval
    specificity: Interval
    ppv: Interval
    npv: Interval

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values; an infinite threshold is None."""
        rates = {
            "sensitivity": self.sensitivity,
            "specificity": self.specificity,
            "ppv": self.ppv,
            "npv": self.npv,
        }
        return {
            "class": self.chosen.label,
            "given": self.chosen.given,
            "wanted": self.chosen.wanted,
            "threshold": finite_or_none(self.chosen.threshold),
            "validation": {
                "sensitivity": self.chosen.sensitivity,
                "specificity": self.chosen.specificity,
            },
            **{name: finite_or_none(rate.estimate) for name, rate in rates.items()},
            "intervals": {name: rate.to_json() for name, rate in rates.items()},
        }


def choose_thresholds(
    predictions: Predictions,
    *,
    at_sensitivity: Sequence[float] = (0.9,),
    at_specificity: Sequence[float] = (0.9,),
) -> tuple[Threshold, ...]:
    """Thresholds for every class against the rest (of two classes, for the second) that has
    images of both kinds.

    At a given specificity the one of the highest sensitivity, at a given sensitivity the one of
    the highest specificity; of several the one that is better in the other rate too.  Thresholds
    are probabilities of validation images, as they are (no temperature).  Raises ``ValueError``
    for a regression and rates outside (0, 1].
    """
    for rate in (*at_sensitivity, *at_specificity):
        if not 0 < rate <= 1:
            raise ValueError(f"a sensitivity or specificity must be in (0, 1], got {rate}")
    labels, probabilities = _labelled(predictions)
    several = labels.ndim == 2
    wanted: list[tuple[Given, float]] = [
        *((_SPECIFICITY, rate) for rate in at_specificity),
        *((_SENSITIVITY, rate) for rate in at_sensitivity),
    ]
    chosen = []
    for label in range(probabilities.shape[1]) if several else _columns(probabilities):
        positive, negative = _truth(labels, label)
        if not negative.any() or not positive.any():
            continue
        known = positive | negative
        scores = probabilities[known, label]
        for given, rate in wanted:
            chosen.append(_choose(label, positive[known], scores, given, rate))
    return tuple(chosen)


def operating_points(
    predictions: Predictions,
    thresholds: Sequence[Threshold],
    *,
    bootstrap: Bootstrap | None = None,
) -> tuple[OperatingPoint, ...]:
    """What ``thresholds`` give on ``predictions``, with intervals where there is a bootstrap."""
    if not thresholds:
        return ()
    labels, probabilities = _labelled(predictions)
    called = np.stack([probabilities[:, t.label] >= t.threshold for t in thresholds], axis=1)
    truth = [_truth(labels, t.label) for t in thresholds]
    positive = np.stack([yes for yes, _ in truth], axis=1)
    negative = np.stack([no for _, no in truth], axis=1)
    known = positive | negative
    truths = {
        "sensitivity": (called & positive, positive),
        "specificity": (~called & negative, negative),
        "ppv": (called & positive, called & known),
        "npv": (~called & negative, ~called & known),
    }

    def rates(counts: NDArray[np.int64]) -> Floats:  # [R, 4 · thresholds]
        weights = counts.astype(np.float64)
        parts = [
            _share(weights @ above.astype(np.float64), weights @ below.astype(np.float64))
            for above, below in truths.values()
        ]
        return np.hstack(parts)

    if bootstrap is None:
        values = rates(np.ones((1, len(labels)), dtype=np.int64))[0]
        intervals = tuple(Interval(float(value), math.nan, math.nan) for value in values)
    else:
        intervals, _ = bootstrap.intervals(rates)
    count = len(thresholds)
    return tuple(
        OperatingPoint(chosen, *intervals[number::count])
        for number, chosen in enumerate(thresholds)
    )


def _choose(
    label: int, positive: NDArray[np.bool_], scores: NDArray[Any], given: Given, wanted: float
) -> Threshold:
    # From calling nothing to calling everything.
    cuts = np.concatenate([[math.inf], np.unique(scores)[::-1]])
    above = np.sort(scores[positive])
    below = np.sort(scores[~positive])
    sensitivity = 1 - np.searchsorted(above, cuts, side="left") / len(above)
    specificity = np.searchsorted(below, cuts, side="left") / len(below)
    kept, other = (
        (specificity, sensitivity) if given == "specificity" else (sensitivity, specificity)
    )
    # A share like 9/10 must count as 0.9, whatever its last bit.
    fits = np.flatnonzero(kept >= wanted - 1e-12)
    best = max(fits.tolist(), key=lambda at: (other[at], kept[at]))
    return Threshold(
        label,
        given,
        wanted,
        float(cuts[best]),
        float(sensitivity[best]),
        float(specificity[best]),
    )


def _truth(labels: NDArray[np.int64], label: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Images of class ``label`` and of the others; with it and without it, of a finding."""
    if labels.ndim == 2:
        return labels[:, label] == 1, labels[:, label] == 0
    return labels == label, labels != label


def _columns(probabilities: NDArray[Any]) -> Sequence[int]:
    return (1,) if probabilities.shape[1] == 2 else range(probabilities.shape[1])


def _labelled(predictions: Predictions) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    if predictions.probabilities is None:
        raise ValueError("operating points are of probabilities; a regression has none")
    if predictions.labels.dim() == 2:
        return predictions.labels.numpy(), predictions.probabilities.numpy()
    labelled = predictions.labels != UNLABELLED
    return predictions.labels[labelled].numpy(), predictions.probabilities[labelled].numpy()


def _share(above: Floats, below: Floats) -> Floats:
    share: Floats = np.where(below > 0, above / np.maximum(below, 1.0), np.nan)
    return share
