"""Many models trained side by side on one stream of features."""

from fpt_fast.sweep.loop import SweepBatches, TrialOutcome, fit_sweep
from fpt_fast.sweep.prediction import predict_sweep
from fpt_fast.sweep.trials import AXES, Trial, distinct_seeds, make_trials, parse_numbers

__all__ = [
    "AXES",
    "SweepBatches",
    "Trial",
    "TrialOutcome",
    "distinct_seeds",
    "fit_sweep",
    "make_trials",
    "parse_numbers",
    "predict_sweep",
]
