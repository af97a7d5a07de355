"""How far the figures of a split can be trusted: intervals of every metric."""

from fpt_fast.trust.assessment import Assessment, assess
from fpt_fast.trust.bootstrap import Interval, IntervalMethod, Intervals, bootstrap_intervals
from fpt_fast.trust.resampled import ResampledMetrics, resampled_metrics

__all__ = [
    "Assessment",
    "Interval",
    "IntervalMethod",
    "Intervals",
    "ResampledMetrics",
    "assess",
    "bootstrap_intervals",
    "resampled_metrics",
]
