"""Comparison of two runs on the images that both were tested on."""

import dataclasses
import json
from pathlib import Path
from typing import TypeVar

from fpt_fast.config import ConfigError
from fpt_fast.files import write_atomically
from fpt_fast.pipeline.compared_data import known_patients, recorded_items
from fpt_fast.pipeline.grades import cuts_of_metrics
from fpt_fast.records import Split
from fpt_fast.report import read_predictions
from fpt_fast.trust import Comparison, compare_predictions
from fpt_fast.words import counted

_T = TypeVar("_T")
_OF_LOGITS = "auc_raw_logits"


def compare(
    first: str | Path,
    second: str | Path,
    *,
    split: Split | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    output: str | Path | None = None,
) -> Comparison:
    """Compare two runs by what they predicted: DeLong's test, paired intervals of the rest.

    Reads ``predictions.csv`` of both runs, which ``train`` writes, or with ``split``
    ``predictions-SPLIT.csv``, which ``evaluate`` writes.  Where the data of a run is still there
    and names patients, the intervals draw whole patients.  ``output`` is a JSON file to write.
    Raises ``ConfigError`` where a run has none, or they are not of the same images and classes.
    """
    suffix = "" if split is None else f"-{split}"
    name, metrics_name = f"predictions{suffix}.csv", f"metrics{suffix}.json"
    tables = []
    for run in (Path(first), Path(second)):
        if not run.is_dir():
            raise ConfigError(f"{run}: there is no such folder; name the folder of a run")
        path = run / name
        if not path.is_file() or not (run / metrics_name).is_file():
            how = "train it" if split is None else f"fpt-fast evaluate --run {run} --split {split}"
            raise ConfigError(f"{run} has no {name}; make it first: {how}")
        values = json.loads((run / metrics_name).read_text(encoding="utf-8"))
        tables.append(read_predictions(path, values["classes"], cuts_of_metrics(values)))
    (ours, classes), (theirs, other_classes) = tables
    if classes != other_classes:
        raise ConfigError(
            f"{first} has the classes {', '.join(classes)}, {second} has "
            f"{', '.join(other_classes)}; compare runs on the same data"
        )
    groups = known_patients(ours.keys, recorded_items([Path(first), Path(second)]))
    try:
        comparison = compare_predictions(
            ours, theirs, classes, level=level, resamples=resamples, groups=groups
        )
    except ValueError as error:
        common = len(set(ours.keys) & set(theirs.keys))
        hint = ""
        if common and len(ours.keys) + len(theirs.keys) > 2 * common:
            hint = f"; --output PAGE.html compares them on the {counted(common, 'image')} of both"
        raise ConfigError(f"{first} and {second} cannot be compared: {error}{hint}") from error
    comparison = _without_logits(comparison)
    if output is not None:
        with write_atomically(Path(output)) as file:
            json.dump(comparison.to_json(), file, indent=1, allow_nan=False)
    return comparison


def _without_logits(comparison: Comparison) -> Comparison:
    """``comparison`` without the AUC on raw logits: predictions.csv holds probabilities alone."""
    return dataclasses.replace(
        comparison,
        first=_but_of_logits(comparison.first),
        second=_but_of_logits(comparison.second),
        differences=_but_of_logits(comparison.differences),
    )


def _but_of_logits(values: dict[str, _T]) -> dict[str, _T]:
    return {name: value for name, value in values.items() if name != _OF_LOGITS}
