"""How far the figures of a split can be trusted: intervals of every metric, calibration,
operating points, and the test of two models on the same images."""

from fpt_fast.trust.assessment import Assessment, assess
from fpt_fast.trust.bootstrap import (
    Bootstrap,
    Interval,
    IntervalMethod,
    Intervals,
    bootstrap_intervals,
)
from fpt_fast.trust.calibration import (
    Calibration,
    CalibrationErrors,
    ReliabilityBin,
    calibration_errors,
    fit_temperature,
    scale_probabilities,
    usable_temperature,
    why_no_temperature,
)
from fpt_fast.trust.comparison import Comparison, compare_predictions
from fpt_fast.trust.delong import AreaDifference, compare_areas, compare_macro_areas
from fpt_fast.trust.finding_calibration import (
    calibrate_findings,
    finding_temperatures,
    why_no_temperatures,
)
from fpt_fast.trust.grade_cuts import Grading, fit_grade_cuts, grading_of
from fpt_fast.trust.operating import (
    OperatingPoint,
    Threshold,
    choose_thresholds,
    operating_points,
)
from fpt_fast.trust.resampled import ResampledMetrics, resampled_metrics

__all__ = [
    "AreaDifference",
    "Assessment",
    "Bootstrap",
    "Calibration",
    "CalibrationErrors",
    "Comparison",
    "Grading",
    "Interval",
    "IntervalMethod",
    "Intervals",
    "OperatingPoint",
    "ReliabilityBin",
    "ResampledMetrics",
    "Threshold",
    "assess",
    "bootstrap_intervals",
    "calibrate_findings",
    "calibration_errors",
    "choose_thresholds",
    "compare_areas",
    "compare_macro_areas",
    "compare_predictions",
    "finding_temperatures",
    "fit_grade_cuts",
    "fit_temperature",
    "grading_of",
    "operating_points",
    "resampled_metrics",
    "scale_probabilities",
    "usable_temperature",
    "why_no_temperature",
    "why_no_temperatures",
]
