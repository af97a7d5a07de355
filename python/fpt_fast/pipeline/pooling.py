"""Out-of-fold predictions: all images of a division, each predicted by the model that had not
seen it, judged together."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fpt_fast.config import ConfigError
from fpt_fast.records import Predictions
from fpt_fast.report import read_predictions, write_run_files
from fpt_fast.report.pooled import PooledRow
from fpt_fast.trust import assess

PREDICTIONS_FILE = "predictions.csv"


def pool_folds(
    models: Sequence[Path],
    target: Path,
    classes: Sequence[str],
    patients: Mapping[str, str] | None,
) -> PooledRow:
    """Put what the ``models`` of all folds predicted of their test images together in ``target``.

    ``target/predictions.csv`` has every image once, ``target/metrics.json`` the metrics with
    intervals, drawn by patient where ``patients`` names the one of each key.  Raises
    ``ConfigError`` where two folds tested the same image.
    """
    predictions = concatenate(
        [read_predictions(model / PREDICTIONS_FILE, classes)[0] for model in models]
    )
    groups = None if patients is None else [patients[key] for key in predictions.keys]
    # The files hold probabilities, of which no AUC on the models' raw logits can be made.
    assessment = assess(predictions, len(classes), groups=groups, names=classes).without(
        "auc_raw_logits"
    )
    if predictions.probabilities is None and not predictions.labels.is_floating_point():
        # Folds learn cut points of their own; one set cannot be that of all of them.
        said = "grades of all folds are cut at the halves, not where each fold's model would"
        metrics = replace(assessment.metrics, notes=(*assessment.metrics.notes, said))
        assessment = replace(assessment, metrics=metrics)
    write_run_files(target, predictions=predictions, classes=classes, assessment=assessment)
    return PooledRow(f"{target.parent.name}/{target.name}", len(predictions.keys), assessment)


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Predictions of different images as one; an image that two parts have is an error."""
    keys = tuple(key for part in parts for key in part.keys)
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ConfigError(
            f"{twice!r} was tested in two folds; pool the folds of one division of the data"
        )
    probabilities = [part.probabilities for part in parts if part.probabilities is not None]
    return Predictions(
        keys,
        torch.cat([part.labels for part in parts]),
        torch.cat([part.logits for part in parts]),
        torch.cat(probabilities) if probabilities else None,
    )
