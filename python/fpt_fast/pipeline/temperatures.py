"""What calibrates a run's probabilities: temperatures fitted on its validation images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpt_fast.config import ConfigError
from fpt_fast.pipeline.run_folder import VALIDATION_FILE
from fpt_fast.report import read_predictions
from fpt_fast.trust import finding_temperatures, fit_temperature

# Where a shared model keeps them, which has no validation images with it.
TEMPERATURES = "temperatures"


def find_temperatures(folder: Path, extra: Mapping[str, Any]) -> tuple[float, ...] | None:
    """What the logits of the run in ``folder`` are divided by: one number, or of several findings
    one each (1 where the validation images do not show a finding both ways).

    ``extra`` is what was saved with its model.  None for a regression, and where neither the
    folder has predictions of validation images nor the model temperatures.
    """
    if extra.get("regression", False):
        return None
    if TEMPERATURES in extra:
        return tuple(map(float, extra[TEMPERATURES]))
    path = folder / VALIDATION_FILE
    if not path.is_file():
        return None
    validation = read_predictions(path)[0]
    if validation.labels.dim() == 1:
        return (fit_temperature(validation),)
    return tuple(value or 1.0 for value in finding_temperatures(validation))


def require_temperatures(folder: Path, extra: Mapping[str, Any]) -> Tensor:
    """The same as [] or [findings] f32; ``ConfigError`` where there are none."""
    if extra.get("regression", False):
        raise ConfigError(
            "calibrated is for probabilities, and grades and numbers have none; leave it out"
        )
    found = find_temperatures(folder, extra)
    if found is None:
        raise ConfigError(
            f"{folder} has no {VALIDATION_FILE} to calibrate by: train writes it where the data "
            "has validation and test images"
        )
    several = extra.get("task") == "multilabel"
    return torch.tensor(found if several else found[0], dtype=torch.float32)
