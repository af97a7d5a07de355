"""What turns a regression's output into a grade or a number, kept with the model: cut points
between grades, learned after training, and the scale of numbers."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fpt_fast.config import TrainConfig
from fpt_fast.records import Predictions
from fpt_fast.run_settings import RunSettings
from fpt_fast.trust import fit_grade_cuts

GRADE_CUTS = "grade_cuts"


def learn_cuts(
    settings: RunSettings, recipe: TrainConfig, chosen_on: Predictions | None, num_classes: int
) -> tuple[float, ...] | None:
    """The best cuts on ``chosen_on``; None where there are no grades, no images, or none wanted."""
    if (
        not recipe.is_regression
        or recipe.target is not None
        or settings.grade_cuts == "halves"
        or chosen_on is None
    ):
        return None
    return fit_grade_cuts(chosen_on, num_classes, settings.grade_cuts)


def cuts_of(extra: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The cuts in what was saved beside a model."""
    cuts = extra.get(GRADE_CUTS)
    return None if cuts is None else tuple(map(float, cuts))


def with_cuts(predictions: Predictions, cuts: tuple[float, ...] | None) -> Predictions:
    """``predictions`` graded by ``cuts``."""
    return dataclasses.replace(predictions, cuts=cuts)


def cuts_of_metrics(metrics: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The cuts that a run's grades were made with, from its ``metrics.json``."""
    grading = metrics.get("grade_cuts")
    return None if grading is None else cuts_of({GRADE_CUTS: grading["cuts"]})


def target_of(extra: Mapping[str, Any]) -> tuple[float, float] | None:
    """What brings a model's output to the unit of its numbers: mean and deviation, or None."""
    target = extra.get("target")
    return None if target is None else (float(target[0]), float(target[1]))
