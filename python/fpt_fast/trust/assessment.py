"""Everything that is said of one split: metrics, and how far they can be trusted."""

from collections.abc import ItemsView, Iterator, KeysView, Sequence
from dataclasses import dataclass
from typing import Any

from fpt_fast.metrics import Metrics, compute_metrics
from fpt_fast.records import Predictions
from fpt_fast.trust.bootstrap import IntervalMethod, Intervals, bootstrap_intervals


@dataclass(frozen=True, slots=True, eq=False)
class Assessment:
    """``metrics`` of a split with their ``intervals`` (None: not asked for).

    Reads like ``Metrics``: ``assessment["auc"]``, ``assessment.values``, ``dict(assessment)``.
    """

    metrics: Metrics
    intervals: Intervals | None = None

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

    def __str__(self) -> str:
        """The metrics with their intervals, and below them how these were made."""
        if self.intervals is None:
            return str(self.metrics)
        lines = [
            ", ".join(f"{name} {interval}" for name, interval in self.intervals.values.items()),
            self.intervals.describe(),
            *(f"note: {note}" for note in self.metrics.notes),
        ]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Those of ``Metrics.to_json``, and ``intervals``."""
        values = self.metrics.to_json()
        if self.intervals is not None:
            values["intervals"] = self.intervals.to_json()
        return values


def assess(
    predictions: Predictions,
    num_classes: int,
    *,
    resamples: int = 2000,
    level: float = 0.95,
    method: IntervalMethod = "percentile",
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Assessment:
    """Metrics of a split, with intervals by ``bootstrap_intervals`` unless ``resamples`` is 0."""
    metrics = compute_metrics(predictions, num_classes)
    if resamples == 0:
        return Assessment(metrics)
    intervals = bootstrap_intervals(
        predictions,
        num_classes,
        level=level,
        resamples=resamples,
        method=method,
        seed=seed,
        groups=groups,
    )
    return Assessment(metrics, intervals)
