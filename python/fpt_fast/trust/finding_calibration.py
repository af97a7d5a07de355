"""Calibration of several findings per image: each is two classes, without and with it, and has a
temperature of its own."""

from typing import Any

import torch
from torch import Tensor

from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.trust.bootstrap import Bootstrap
from fpt_fast.trust.calibration import (
    Calibration,
    calibration_errors,
    usable_temperature,
    why_no_temperature,
)


def as_two_classes(predictions: Predictions, finding: int) -> Predictions:
    """Column ``finding`` as predictions of two classes, whose softmax is the finding's sigmoid."""
    with_it = predictions.logits[:, finding].double()
    logits = torch.stack([torch.zeros_like(with_it), with_it], dim=1)
    probabilities = logits.softmax(dim=1).float()
    return Predictions(predictions.keys, predictions.labels[:, finding], logits, probabilities)


def finding_temperatures(validation: Predictions) -> tuple[float | None, ...]:
    """For each finding the ``T`` for which ``sigmoid(logit / T)`` explains the labels best; None
    where ``validation`` does not have known images both with and without it, or where all are
    right or no better than chance."""
    return tuple(
        usable_temperature(as_two_classes(validation, finding))
        if _both(validation, finding)
        else None
        for finding in range(validation.logits.shape[1])
    )


def why_no_temperatures(validation: Predictions) -> tuple[str | None, ...]:
    """Why ``finding_temperatures`` is None, for each finding; None where it is a number."""
    return tuple(
        why_no_temperature(as_two_classes(validation, finding))
        if _both(validation, finding)
        else _of_one_kind(validation.labels[:, finding])
        for finding in range(validation.logits.shape[1])
    )


def calibrate_findings(
    predictions: Predictions,
    validation: Predictions | None,
    bootstrap: dict[str, Any] | None = None,
) -> tuple[Calibration | None, ...]:
    """Errors of each finding's probabilities as they are, and at its temperature of ``validation``.

    None for a finding that no image tells.  ``bootstrap``: arguments of ``Bootstrap``, for
    intervals, or None for none.
    """
    count = predictions.logits.shape[1]
    temperatures = (None,) * count if validation is None else finding_temperatures(validation)
    return tuple(
        _calibration(as_two_classes(predictions, finding), temperature, bootstrap)
        for finding, temperature in enumerate(temperatures)
    )


def _calibration(
    finding: Predictions, temperature: float | None, options: dict[str, Any] | None
) -> Calibration | None:
    if not bool((finding.labels != UNLABELLED).any()):
        return None
    drawn = None if options is None else Bootstrap(finding, **options)
    plain = calibration_errors(finding, bootstrap=drawn)
    if temperature is None:
        return Calibration(plain, None, None)
    scaled = calibration_errors(finding, temperature=temperature, bootstrap=drawn)
    return Calibration(plain, temperature, scaled)


def _of_one_kind(labels: Tensor) -> str:
    if bool((labels == 1).any()):
        return "no validation image is known to be without it"
    if bool((labels == 0).any()):
        return "no validation image is known to have it"
    return "of no validation image is it known"


def _both(predictions: Predictions, finding: int) -> bool:
    labels = predictions.labels[:, finding]
    return bool((labels == 1).any()) and bool((labels == 0).any())
