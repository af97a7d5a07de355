"""Rules over the files that a run left: whether training went well."""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fpt_fast.doctor.findings import Finding
from fpt_fast.words import counted_are

Row = Mapping[str, float]

# Loss of validation over its least, beyond which the model has been learning by heart.
_BY_HEART = 1.3
# An AUC that chance alone often gives.
_CHANCE = 0.55
# A finding called on this share of the images and there on less than that says nothing.
_NEARLY_ALL, _SELDOM = 0.95, 0.8


def find_in_run(run: Path, *, balanced: bool = False) -> list[Finding]:
    """What ``history.csv``, ``metrics.json`` and ``predictions.csv`` of a run folder say;
    ``balanced``: its loss was weighted already."""
    history, metrics = run / "history.csv", run / "metrics.json"
    if not history.is_file() or not metrics.is_file():
        checkpoint = (run / "last").is_dir()
        return [
            Finding(
                "error",
                f"{run} has not finished: it has no history.csv or no metrics.json",
                "go on with `fpt-fast train ... --resume`" if checkpoint else "train it again",
            )
        ]
    try:
        rows = _read_history(history)
        values = json.loads(metrics.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        return [Finding("error", f"the run's files cannot be read: {error}", "train it again")]
    found = list(_curves(rows, values))
    if values.get("r2") is not None and values["r2"] <= 0:
        found.append(
            Finding(
                "warning",
                f"R2 is {values['r2']:.3f}: the mean of all numbers would be as good a prediction",
                "train longer, try other learning rates, look at the numbers (doctor --data)",
            )
        )
    if (run / "predictions.csv").is_file():
        found += _guesses(run / "predictions.csv", _advice(values, balanced))
    return found


def _read_history(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: float(cell) if cell else math.nan for name, cell in row.items()}
            for row in csv.DictReader(file)
        ]


def _curves(rows: Sequence[Row], metrics: Mapping[str, Any]) -> Iterator[Finding]:
    if not rows:
        yield Finding("error", "the run has no finished epoch", "train it again")
        return
    losses = [row["loss"] for row in rows]
    if not all(map(math.isfinite, losses)):
        yield Finding(
            "error", "the training loss is not finite", "lower --learning-rate, train in float32"
        )
        return
    if len(losses) > 2 and losses[-1] >= losses[0]:
        yield Finding(
            "warning",
            f"the training loss did not fall ({losses[0]:.3g} -> {losses[-1]:.3g})",
            "try other learning rates: fpt-fast sweep --learning-rate ...",
        )
    val = [row["val_loss"] for row in rows if math.isfinite(row.get("val_loss", math.nan))]
    if val and val[-1] > _BY_HEART * min(val):
        yield Finding(
            "note",
            f"the validation loss rose from {min(val):.3g} to {val[-1]:.3g} after its best: the "
            "model learned its images by heart (the best epoch was kept)",
        )
    monitor, best = metrics.get("monitor"), metrics.get("best_epoch")
    if best is not None and best == len(rows) - 1 and len(rows) > 1:
        yield Finding(
            "note", "the last epoch was the best one", "more --epochs may give a better model"
        )
    value = metrics.get("best_value")
    if monitor == "auc" and value is not None and value < _CHANCE:
        yield Finding(
            "warning",
            f"the best validation AUC is {value:.3f}: no better than chance",
            "check the labels (fpt-fast doctor --data ...), try other learning rates",
        )


def _advice(metrics: Mapping[str, Any], balanced: bool) -> str:
    """What to do where calling at 0.5, or what is likeliest, says nothing."""
    advice = "judge by AUC"
    if metrics.get("operating_points"):
        advice += (
            ", and call by the operating points: where the probability in predictions.csv is at "
            "least the threshold in operating_points of metrics.json (report.html has them too)"
        )
    else:
        advice += "; with validation images there are thresholds to call by (operating points)"
    return advice + ("" if balanced else "; or train with --loss-weight balance")


def _guesses(path: Path, advice: str) -> Iterator[Finding]:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if rows and "predicted" not in rows[0]:
        yield from _called_findings(rows, advice)
        return
    guessed = {row.get("predicted") for row in rows}
    labels = {row.get("label") for row in rows}
    if len(rows) > 1 and len(guessed) == 1 and len(labels) > 1:
        yield Finding(
            "warning",
            f"every one of {len(rows)} images is predicted as {guessed.pop()!r}",
            advice,
        )


def _called_findings(rows: Sequence[Mapping[str, str]], advice: str) -> Iterator[Finding]:
    """Of several findings per image: those that are called on nearly every image, and never."""
    always, never = [], []
    for column in rows[0]:
        if not column.startswith("predicted_"):
            continue
        name = column.removeprefix("predicted_")
        known = [row for row in rows if row[f"label_{name}"]]
        called = [row[column] == "1" for row in known]
        there = sum(row[f"label_{name}"] == "1" for row in known)
        said = f"{name}: called on {sum(called)} of {len(known)} images, there on {there}"
        if known and sum(called) >= _NEARLY_ALL * len(known) and there < _SELDOM * len(known):
            always.append(said)
        elif there > 1 and not any(called):
            never.append(said)
    if always:
        yield Finding(
            "warning",
            f"{counted_are(len(always), 'finding')} called on nearly every image",
            advice,
            tuple(always),
        )
    if never:
        yield Finding(
            "warning",
            f"{counted_are(len(never), 'finding')} never called although there are images with it",
            advice,
            tuple(never),
        )
