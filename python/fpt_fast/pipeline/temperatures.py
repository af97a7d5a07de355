"""What calibrates a run's probabilities: temperatures fitted on its validation images."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpt_fast.config import ConfigError
from fpt_fast.pipeline.run_folder import VALIDATION_FILE
from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.report import read_predictions
from fpt_fast.trust import (
    finding_temperatures,
    usable_temperature,
    why_no_temperature,
    why_no_temperatures,
)
from fpt_fast.trust.calibration import FEW

log = logging.getLogger("fpt_fast")

# Where a shared model keeps them, which has no validation images with it.
TEMPERATURES = "temperatures"


def find_temperatures(folder: Path, extra: Mapping[str, Any]) -> tuple[float, ...] | None:
    """What the logits of the run in ``folder`` are divided by: one number, or of several findings
    one each (1 where the validation images allow none).

    ``extra`` is what was saved with its model.  None for a regression, and where neither the
    folder has predictions of validation images nor the model temperatures.
    """
    fitted = _fitted(folder, extra)
    return None if fitted is None else tuple(value or 1.0 for value in fitted)


def require_temperatures(folder: Path, extra: Mapping[str, Any]) -> Tensor:
    """The same as [] or [findings] f32, with a warning of what cannot be calibrated.

    Raises ``ConfigError`` where there is nothing to calibrate by.
    """
    if extra.get("regression", False):
        raise ConfigError(
            "calibrated is for probabilities, and grades and numbers have none; leave it out"
        )
    fitted = _fitted(folder, extra)
    if fitted is None:
        raise ConfigError(
            f"{folder} has no {VALIDATION_FILE} to calibrate by: train writes it where the data "
            "has validation and test images"
        )
    several = extra.get("task") == "multilabel"
    if TEMPERATURES not in extra:
        validation = read_predictions(folder / VALIDATION_FILE)[0]
        _warn_of_few(validation, fitted)
        _warn_of_none(validation, extra["classes"] if several else None)
    values = [value or 1.0 for value in fitted]
    return torch.tensor(values if several else values[0], dtype=torch.float32)


def _warn_of_none(validation: Predictions, findings: Sequence[str] | None) -> None:
    """Say of what there is no temperature, and why."""
    several = findings is not None
    reasons = why_no_temperatures(validation) if several else (why_no_temperature(validation),)
    for name, reason in zip(findings or ("",), reasons, strict=True):
        if reason is not None:
            log.warning(
                "the probabilities %scannot be calibrated and stay as they are: %s",
                *(f"of {name} " if several else "", reason),
            )


def _warn_of_few(validation: Predictions, fitted: Sequence[float | None]) -> None:
    """Say where a temperature was fitted on few images; of findings the one of the fewest."""
    told = (validation.labels != UNLABELLED).reshape(len(validation.labels), -1).sum(dim=0)
    least = min(
        (count for count, value in zip(told.tolist(), fitted, strict=True) if value is not None),
        default=FEW,
    )
    if least < FEW:
        log.warning(
            "the probabilities are calibrated on %d validation image%s: with fewer than %d they "
            "may be further off than plain ones; `fpt-fast evaluate` has both errors of the test "
            "images",
            *(least, "" if least == 1 else "s", FEW),
        )


def _fitted(folder: Path, extra: Mapping[str, Any]) -> tuple[float | None, ...] | None:
    """The temperatures, None in the place of one that the validation images do not allow."""
    if extra.get("regression", False):
        return None
    if TEMPERATURES in extra:
        return tuple(map(float, extra[TEMPERATURES]))
    path = folder / VALIDATION_FILE
    if not path.is_file():
        return None
    validation = read_predictions(path)[0]
    if validation.labels.dim() == 1:
        return (usable_temperature(validation),)
    return finding_temperatures(validation)
