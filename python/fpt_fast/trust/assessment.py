"""Everything that is said of one split: metrics, and how far they can be trusted."""

import statistics
from collections.abc import ItemsView, Iterator, KeysView, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fpt_fast.metrics import Metrics, compute_metrics, spoken
from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.trust.bootstrap import (
    Bootstrap,
    Interval,
    IntervalMethod,
    Intervals,
    bootstrap_intervals,
)
from fpt_fast.trust.calibration import (
    Calibration,
    calibration_errors,
    fit_temperature,
    usable_temperature,
)
from fpt_fast.trust.finding_calibration import calibrate_findings
from fpt_fast.trust.grade_cuts import Grading, grading_of
from fpt_fast.trust.operating import OperatingPoint, choose_thresholds, operating_points

_SEEN = (
    "the cut points between grades were chosen on these very images: accuracy, F1, precision, "
    "recall and kappa are too good"
)


@dataclass(frozen=True, slots=True, eq=False)
class Assessment:
    """``metrics`` of a split with their ``intervals`` (None: not asked for), the ``calibration``
    of its probabilities (None: a regression), ``points`` of operation (without validation
    images, none) and the ``grading`` by learned cuts (None: there are none).  Of several findings
    per image, ``by_finding`` is the calibration of each (None: no image tells it), and ``names``
    what they are called (empty: not known).

    Reads like ``Metrics``: ``assessment["auc"]``, ``assessment.values``, ``dict(assessment)``.
    """

    metrics: Metrics
    intervals: Intervals | None = None
    calibration: Calibration | None = None
    points: tuple[OperatingPoint, ...] = ()
    grading: Grading | None = None
    by_finding: tuple[Calibration | None, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, float]:
        """The metrics by name."""
        return self.metrics.values

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    def __contains__(self, name: object) -> bool:
        return name in self.metrics

    def __iter__(self) -> Iterator[str]:
        return iter(self.metrics)

    def __len__(self) -> int:
        return len(self.metrics)

    def keys(self) -> KeysView[str]:
        """Names of the metrics, in order."""
        return self.metrics.keys()

    def items(self) -> ItemsView[str, float]:
        """Names and values, in order."""
        return self.metrics.items()

    def without(self, name: str) -> "Assessment":
        """The same without the metric ``name`` and its interval."""
        kept = {key: value for key, value in self.metrics.values.items() if key != name}
        intervals = self.intervals
        if intervals is not None:
            shown = {key: value for key, value in intervals.values.items() if key != name}
            undefined = {key: count for key, count in intervals.undefined.items() if key != name}
            intervals = replace(intervals, values=shown, undefined=undefined)
        return replace(self, metrics=replace(self.metrics, values=kept), intervals=intervals)

    def __str__(self) -> str:
        """The metrics with their intervals, how these were made, and the calibration error."""
        if self.intervals is None:
            said = [f"{spoken(name)} {value:.4f}" for name, value in self.metrics.items()]
            lines = [", ".join(said)]
        else:
            named = self.intervals.values.items()
            said = [f"{spoken(name)} {interval}" for name, interval in named]
            lines = [", ".join(said), self.intervals.describe()]
        lines += _described(self.grading)
        if self.calibration is not None and self.intervals is not None:
            lines.append(_describe(self.calibration))
        if self.by_finding:
            lines.append(_describe_findings(self.by_finding, self.names))
        return "\n".join([*lines, *(f"note: {note}" for note in self.metrics.notes)])

    def to_json(self) -> dict[str, Any]:
        """``Metrics.to_json`` and ``intervals``, ``calibration``, ``operating_points``,
        ``grade_cuts``, ``calibration_by_finding``."""
        values = self.metrics.to_json()
        if self.intervals is not None:
            values["intervals"] = self.intervals.to_json()
        if self.calibration is not None:
            values["calibration"] = self.calibration.to_json()
        if self.points:
            values["operating_points"] = [point.to_json() for point in self.points]
        if self.grading is not None:
            values["grade_cuts"] = self.grading.to_json()
        if self.by_finding:
            values["calibration_by_finding"] = [
                None if found is None else found.to_json() for found in self.by_finding
            ]
        return values


def assess(
    predictions: Predictions,
    num_classes: int,
    *,
    validation: Predictions | None = None,
    at_sensitivity: Sequence[float] = (0.9,),
    at_specificity: Sequence[float] = (0.9,),
    resamples: int = 2000,
    level: float = 0.95,
    method: IntervalMethod = "percentile",
    seed: int = 0,
    groups: Sequence[str] | None = None,
    cuts_seen: bool = False,
    names: Sequence[str] | None = None,
) -> Assessment:
    """Metrics of a split, with intervals by ``bootstrap_intervals`` unless ``resamples`` is 0.

    ``validation`` are predictions of the same model on validation images, on which temperature
    and thresholds are chosen; labelled images are needed there.  ``cuts_seen``: the cuts of
    ``predictions`` were chosen on these very images, which a note then says.
    ``names`` of the classes are for the notes.
    """
    metrics = compute_metrics(predictions, num_classes, names)
    if cuts_seen and predictions.cuts is not None:
        metrics = replace(metrics, notes=(*metrics.notes, _SEEN))
    intervals: Intervals | None = None
    bootstrap: Bootstrap | None = None
    options: dict[str, Any] | None = None
    if resamples:
        options = {
            "level": level,
            "resamples": resamples,
            "method": method,
            "seed": seed,
            "groups": groups,
        }
        intervals = bootstrap_intervals(predictions, num_classes, **options)
        bootstrap = Bootstrap(predictions, **options)
    if predictions.probabilities is None:
        grading = grading_of(predictions, num_classes)
        return Assessment(metrics, intervals, grading=grading)
    if predictions.labels.dim() == 2:
        called = tuple(names or ())
        # Of several findings per image each has thresholds and a temperature.
        if validation is None or not bool((validation.labels != UNLABELLED).any()):
            by_finding = calibrate_findings(predictions, None, options)
            return Assessment(metrics, intervals, by_finding=by_finding, names=called)
        by_finding = calibrate_findings(predictions, validation, options)
        thresholds = choose_thresholds(
            validation, at_sensitivity=at_sensitivity, at_specificity=at_specificity
        )
        points = operating_points(predictions, thresholds, bootstrap=bootstrap)
        return Assessment(metrics, intervals, None, points, None, by_finding, called)
    plain = calibration_errors(predictions, bootstrap=bootstrap)
    if validation is None or not bool((validation.labels != UNLABELLED).any()):
        return Assessment(metrics, intervals, Calibration(plain, None, None))
    temperature = fit_temperature(validation)
    scaled = None
    if usable_temperature(validation) is not None:
        scaled = calibration_errors(predictions, temperature=temperature, bootstrap=bootstrap)
    thresholds = choose_thresholds(
        validation, at_sensitivity=at_sensitivity, at_specificity=at_specificity
    )
    points = operating_points(predictions, thresholds, bootstrap=bootstrap)
    told = int((validation.labels != UNLABELLED).sum())
    calibration = Calibration(plain, temperature, scaled, told)
    return Assessment(metrics, intervals, calibration, points)


def _describe_findings(findings: Sequence[Calibration | None], names: Sequence[str]) -> str:
    """Mean calibration error of the findings, and of those with a temperature without and at it."""
    known = [found for found in findings if found is not None]
    line = f"calibration error, mean of findings {_mean([f.plain.ece for f in known])}"
    scaled = [(f.plain.ece, f.scaled.ece) for f in known if f.scaled is not None]
    if not scaled:
        return line
    at_it = _mean([error for _, error in scaled])
    if len(scaled) == len(known):
        return f"{line}, each at its own temperature {at_it}"
    plain = _mean([error for error, _ in scaled])
    named = ""
    if names:
        pairs = zip(names, findings, strict=True)
        of_these = [name for name, f in pairs if f is not None and f.scaled is not None]
        named = f" ({', '.join(of_these)})"
    return f"{line}; of the {len(scaled)} with a temperature{named} {plain}, at it {at_it}"


def _mean(errors: Sequence[Interval]) -> str:
    return f"{statistics.fmean(error.estimate for error in errors):.4f}" if errors else "unknown"


def _described(grading: Grading | None) -> list[str]:
    if grading is None:
        return []
    cuts = ", ".join(f"{cut:.3f}" for cut in grading.cuts)
    said = ", ".join(f"{spoken(name)} {value:.4f}" for name, value in grading.at_halves.items())
    return [f"grades by learned cuts at {cuts}; by the halves: {said}"]


def _describe(calibration: Calibration) -> str:
    line = f"calibration error {calibration.plain.ece}"
    if calibration.scaled is not None and calibration.temperature is not None:
        line += f", at temperature {calibration.temperature:.3f} {calibration.scaled.ece}"
    return line if calibration.warning is None else f"{line} ({calibration.warning})"
