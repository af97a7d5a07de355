"""Bootstrap confidence intervals of every metric, by image or by patient.

Resamples are stratified: each class keeps its number of images (or of patients), so that no
resample lacks a rare class by chance and the intervals are those of a study with these class
sizes.  ``percentile`` takes the quantiles of the resampled metric; ``bca`` (bias-corrected and
accelerated) moves them by the bias of the resamples and by the skewness of the jackknife.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapters 13 and 14.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from fpt_fast.metrics import finite_or_none, is_labelled
from fpt_fast.records import Predictions
from fpt_fast.trust.resampled import Floats, make_resampler

IntervalMethod = Literal["percentile", "bca"]
# A metric that fewer resamples define has no interval.
_SMALLEST_SHARE = 0.5
# Counts of one block of resamples: 16 MB, which a processor's cache nearly holds.
_BLOCK_ELEMENTS = 2_000_000


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
    stratified: bool = True

    def __getitem__(self, name: str) -> Interval:
        return self.values[name]

    def describe(self) -> str:
        """How they were made, in words."""
        kind = "percentile" if self.method == "percentile" else "BCa"
        return (
            f"{self.level:.0%} confidence intervals: {kind} bootstrap, {self.resamples} resamples "
            f"of {self.units}{', stratified by class' * self.stratified}, seed {self.seed}"
        )

    def to_json(self) -> dict[str, Any]:
        """Low and high by metric and by class, and how they were made, as JSON values."""
        return {
            "level": self.level,
            "method": self.method,
            "resamples": self.resamples,
            "seed": self.seed,
            "units": self.units,
            "stratified": self.stratified,
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
    resampler = make_resampler(predictions, num_classes)
    bootstrap = Bootstrap(
        predictions, level=level, resamples=resamples, method=method, seed=seed, groups=groups
    )
    values, per_class = list(resampler.value_names), list(resampler.class_names)

    def columns(counts: NDArray[np.int64]) -> Floats:  # [R, values + names by class]
        metrics = resampler(counts)
        by_class = [metrics.per_class[name] for name in per_class]
        return np.hstack([*(metrics.values[name][:, None] for name in values), *by_class])

    intervals, undefined = bootstrap.intervals(columns)
    rest = iter(intervals[len(values) :])
    return Intervals(
        values=dict(zip(values, intervals[: len(values)], strict=True)),
        per_class={name: tuple(next(rest) for _ in range(num_classes)) for name in per_class},
        level=level,
        method=method,
        resamples=resamples,
        seed=seed,
        units=bootstrap.units,
        undefined={name: n for name, n in zip(values, undefined, strict=False) if n},
        stratified=bootstrap.stratified,
    )


class Bootstrap:
    """The resamples of the labelled images of ``predictions``, for any statistic of counts.

    Every call of ``intervals`` sees the same resamples, so that statistics may be compared.
    Arguments and errors: those of ``bootstrap_intervals``.
    """

    def __init__(
        self,
        predictions: Predictions,
        *,
        level: float = 0.95,
        resamples: int = 2000,
        method: IntervalMethod = "percentile",
        seed: int = 0,
        groups: Sequence[str] | None = None,
    ) -> None:
        if not 0 < level < 1:
            raise ValueError(f"level must be between 0 and 1, like 0.95, got {level}")
        if resamples < 2:
            raise ValueError(f"resamples must be at least 2, and better 2000, got {resamples}")
        if method not in get_args(IntervalMethod):
            raise ValueError(f"method must be percentile or bca, got {method!r}")
        labelled = is_labelled(predictions.labels).numpy()
        labels = predictions.labels.numpy()
        self.stratified = labels.ndim == 1 and not predictions.labels.is_floating_point()
        if not self.stratified:
            # Several findings, or a number: images are drawn as they are, whatever they show.
            if labels.ndim == 2:
                labelled = np.ones(len(labels), dtype=np.bool_)
            labels = np.zeros(len(labels), dtype=np.int64)
        labels = labels[labelled]
        self.units = "images" if groups is None else "patients"
        self._unit_of = _units(groups, labelled, len(predictions.keys))
        self._strata = _strata(self._unit_of, labels)
        self._level, self._resamples, self._method, self._seed = level, resamples, method, seed

    def intervals(
        self, statistic: Callable[[NDArray[np.int64]], Floats]
    ) -> tuple[tuple[Interval, ...], tuple[int, ...]]:
        """Intervals of the columns of ``statistic(counts [R, images]) -> [R, columns]``.

        Beside them, for each column, how many resamples did not define it (NaN).
        """
        drawn = np.concatenate([statistic(counts) for counts in self._draws()])
        one = statistic(np.ones((1, len(self._unit_of)), dtype=np.int64))[0]
        left_out: Floats | None = None
        if self._method == "bca":
            left_out = np.concatenate([statistic(counts) for counts in self._without_each()])
        intervals = tuple(
            _interval(
                float(one[column]),
                drawn[:, column],
                None if left_out is None else left_out[:, column],
                self._strata,
                self._level,
            )
            for column in range(drawn.shape[1])
        )
        return intervals, tuple(np.isnan(drawn).sum(axis=0).tolist())

    def _draws(self) -> Iterator[NDArray[np.int64]]:
        rng = np.random.default_rng(self._seed)
        for size in self._blocks(self._resamples):
            yield _draw(self._strata, size, rng)[:, self._unit_of]

    def _without_each(self) -> Iterator[NDArray[np.int64]]:
        """Counts without one unit, for each unit; all of a single one, which has no rest."""
        units = int(self._unit_of.max()) + 1
        if units == 1:
            yield np.ones((1, len(self._unit_of)), dtype=np.int64)
            return
        first = 0
        for size in self._blocks(units):
            block = np.arange(first, first + size)[:, None]
            yield (self._unit_of[None, :] != block).astype(np.int64)
            first += size

    def _blocks(self, rows: int) -> Iterator[int]:
        size = max(1, _BLOCK_ELEMENTS // len(self._unit_of))
        for first in range(0, rows, size):
            yield min(size, rows - first)


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
