"""Bootstrap confidence intervals of every metric, by image or by patient.

Resamples are stratified: each class keeps its number of images (or of patients), so that no
resample lacks a rare class by chance and the intervals are those of a study with these class
sizes.  ``percentile`` takes the quantiles of the resampled metric; ``bca`` (bias-corrected and
accelerated) moves them by the bias of the resamples and by the skewness of the jackknife.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 14.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fpt_fast.metrics import finite_or_none
from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.trust.resampled import Floats, ResampledMetrics, Resampler

IntervalMethod = Literal["percentile", "bca"]
# A metric that fewer resamples define has no interval.
_SMALLEST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Interval:
    """A metric and its confidence interval; NaN where it has none."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        """Like ``0.912 [0.850, 0.961]``."""
        return f"{self.estimate:.4f} [{self.low:.4f}, {self.high:.4f}]"

    def to_json(self) -> list[float | None]:
        """Low and high; None for NaN."""
        return [finite_or_none(self.low), finite_or_none(self.high)]


@dataclass(frozen=True, slots=True, eq=False)
class Intervals:
    """Intervals of the metrics of a split, by the names of ``Metrics.values``.

    ``per_class`` holds, by name (precision, recall, specificity, f1, auc), one interval a class;
    ``units`` is what was drawn (images, or patients) and ``undefined`` counts, by metric, the
    resamples that did not define it and were left out.
    """

    values: dict[str, Interval]
    per_class: dict[str, tuple[Interval, ...]]
    level: float
    method: IntervalMethod
    resamples: int
    seed: int
    units: str
    undefined: dict[str, int]

    def __getitem__(self, name: str) -> Interval:
        return self.values[name]

    def describe(self) -> str:
        """How they were made, in words."""
        kind = "percentile" if self.method == "percentile" else "BCa"
        return (
            f"{self.level:.0%} confidence intervals: {kind} bootstrap, {self.resamples} resamples "
            f"of {self.units}, stratified by class, seed {self.seed}"
        )

    def to_json(self) -> dict[str, Any]:
        """Low and high by metric and by class, and how they were made, as JSON values."""
        return {
            "level": self.level,
            "method": self.method,
            "resamples": self.resamples,
            "seed": self.seed,
            "units": self.units,
            "stratified": True,
            "values": {name: interval.to_json() for name, interval in self.values.items()},
            "per_class": {
                name: [interval.to_json() for interval in row]
                for name, row in self.per_class.items()
            },
            "undefined_resamples": dict(self.undefined),
        }


def bootstrap_intervals(
    predictions: Predictions,
    num_classes: int,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    method: IntervalMethod = "percentile",
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Intervals:
    """Confidence intervals of all metrics of ``compute_metrics``, and of those of each class.

    ``groups`` names the patient of each image: patients are then drawn whole, stratified by the
    most frequent class of their images (of several, the highest), since images of one patient
    are not independent.  Images without a label are left out.  Equal arguments give equal
    intervals.

    Raises ``ValueError`` for what ``compute_metrics`` refuses, a level outside (0, 1), fewer than
    two resamples, another method, or groups that are not one name for each image.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, like 0.95, got {level}")
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, and better 2000, got {resamples}")
    if method not in get_args(IntervalMethod):
        raise ValueError(f"method must be percentile or bca, got {method!r}")
    resampler = Resampler(predictions, num_classes)
    labelled = (predictions.labels != UNLABELLED).numpy()
    unit_of = _units(groups, labelled, len(predictions.keys))
    strata = _strata(unit_of, resampler.labels)
    rng = np.random.default_rng(seed)
    drawn = _computed(
        resampler,
        (_draw(strata, size, rng)[:, unit_of] for size in resampler.blocks(resamples)),
    )
    one = resampler(np.ones((1, len(unit_of)), dtype=np.int64))
    jackknife = _jackknife(resampler, unit_of) if method == "bca" else None

    def interval(name: str, column: int | None = None) -> Interval:
        def of(metrics: ResampledMetrics) -> Floats:
            return metrics.values[name] if column is None else metrics.per_class[name][:, column]

        left_out = None if jackknife is None else of(jackknife)
        return _interval(float(of(one)[0]), of(drawn), left_out, strata, level)

    return Intervals(
        values={name: interval(name) for name in drawn.values},
        per_class={
            name: tuple(interval(name, column) for column in range(num_classes))
            for name in drawn.per_class
        },
        level=level,
        method=method,
        resamples=resamples,
        seed=seed,
        units="images" if groups is None else "patients",
        undefined={
            name: missing
            for name, values in drawn.values.items()
            if (missing := int(np.isnan(values).sum()))
        },
    )


def _units(
    groups: Sequence[str] | None, labelled: NDArray[np.bool_], images: int
) -> NDArray[np.int64]:
    """Number of the unit that is drawn with each labelled image: [labelled images]."""
    if groups is None:
        return np.arange(int(labelled.sum()))
    if len(groups) != images:
        raise ValueError(
            f"groups must name the patient of each of {images} images, got {len(groups)} names"
        )
    names = [name for name, known in zip(groups, labelled, strict=True) if known]
    _, unit_of = np.unique(np.array(names, dtype=object).astype(str), return_inverse=True)
    return unit_of.astype(np.int64)


def _strata(unit_of: NDArray[np.int64], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], ...]:
    """Units of each class: the one that most of a unit's images have (of several, the highest)."""
    counts = np.zeros((int(unit_of.max()) + 1, int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (unit_of, labels), 1)
    last = counts.shape[1] - 1
    label_of = last - np.argmax(counts[:, ::-1], axis=1)
    return tuple(np.flatnonzero(label_of == label) for label in np.unique(label_of))


def _draw(
    strata: Sequence[NDArray[np.int64]], size: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """How often each unit is in each of ``size`` resamples: [size, units]."""
    units = sum(map(len, strata))
    counts = np.zeros((size, units), dtype=np.int64)
    rows = np.arange(size)[:, None]
    for members in strata:
        picks = rng.integers(0, len(members), (size, len(members)))
        flat = np.bincount((rows * len(members) + picks).ravel(), minlength=size * len(members))
        counts[:, members] = flat.reshape(size, len(members))
    return counts


def _jackknife(resampler: Resampler, unit_of: NDArray[np.int64]) -> ResampledMetrics:
    """Metrics without one unit, for each unit: ``values`` [units]."""
    units = int(unit_of.max()) + 1

    def left_out() -> Iterator[NDArray[np.int64]]:
        first = 0
        for size in resampler.blocks(units):
            block = np.arange(first, first + size)[:, None]
            yield (unit_of[None, :] != block).astype(np.int64)
            first += size

    # A single unit has nothing left without it.
    return _computed(resampler, left_out() if units > 1 else iter(()))


def _computed(resampler: Resampler, blocks: Iterator[NDArray[np.int64]]) -> ResampledMetrics:
    parts = [resampler(block) for block in blocks]
    if not parts:
        nothing = np.ones((1, len(resampler.labels)), dtype=np.int64)
        return resampler(nothing)
    return ResampledMetrics(
        {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values},
        {
            name: np.concatenate([part.per_class[name] for part in parts])
            for name in parts[0].per_class
        },
    )


def _interval(
    estimate: float,
    drawn: Floats,
    left_out: Floats | None,
    strata: Sequence[NDArray[np.int64]],
    level: float,
) -> Interval:
    known = drawn[np.isfinite(drawn)]
    if math.isnan(estimate) or len(known) < max(2, _SMALLEST_SHARE * len(drawn)):
        return Interval(estimate, math.nan, math.nan)
    ends = ((1 - level) / 2, (1 + level) / 2)
    if left_out is not None:
        ends = _accelerated(ends, estimate, known, left_out, strata)
    low, high = np.quantile(known, ends)
    return Interval(estimate, float(low), float(high))


def _accelerated(
    ends: tuple[float, float],
    estimate: float,
    drawn: Floats,
    left_out: Floats,
    strata: Sequence[NDArray[np.int64]],
) -> tuple[float, float]:
    """Where BCa looks instead of at ``ends``; they stay where all resamples are alike."""
    below = (float((drawn < estimate).mean()) + float((drawn <= estimate).mean())) / 2
    if not 0 < below < 1:
        return ends
    normal = NormalDist()
    bias = normal.inv_cdf(below)
    cubes, squares = 0.0, 0.0
    for members in strata:
        values = left_out[members]
        influence = (len(members) - 1) * (np.nanmean(values) - values)
        cubes += float(np.nansum(influence**3)) / len(members) ** 3
        squares += float(np.nansum(influence**2)) / len(members) ** 2
    acceleration = cubes / (6 * squares**1.5) if squares > 0 else 0.0
    low, high = (bias + normal.inv_cdf(end) for end in ends)
    return (
        normal.cdf(bias + low / (1 - acceleration * low)),
        normal.cdf(bias + high / (1 - acceleration * high)),
    )
