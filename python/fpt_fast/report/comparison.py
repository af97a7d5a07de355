"""One self-contained page of several runs, side by side."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fpt_fast.files import write_atomically
from fpt_fast.records import Predictions
from fpt_fast.report.comparison_figures import (
    MOST_RUNS,
    overlaid_learning,
    overlaid_thresholds,
    swatch,
)
from fpt_fast.report.comparison_tests import Pair, cell, differences
from fpt_fast.report.disagreement import disagreement_table
from fpt_fast.report.html import document, flatten, image_tag
from fpt_fast.report.trust import TITLES
from fpt_fast.trust import Interval

_COLUMNS = (
    *("auc", "ap", "exact_match", "accuracy", "f1", "kappa"),
    *("mae", "mse", "rmse", "r2", "pearson", "spearman"),
)
_ERRORS = {"ece": "Calibration error", "nll": "Log loss"}
# Parts of a configuration, later ones more telling where both name a setting.
_PARTS = ("settings", "method", "training", "features")
# Where a run lies and how it was started says nothing about what it is.
_OF_THE_PLACE = {"run", "resume", "overwrite", "cache", "side_cache", "workers", "source"}


@dataclass(frozen=True, slots=True, eq=False)
class ComparedRun:
    """A run as its folder has it: ``predictions`` of the split, the values of ``metrics.json``,
    the columns of ``history.csv`` (empty without one; NaN where a cell is) and ``config.yaml``."""

    name: str
    predictions: Predictions
    metrics: Mapping[str, Any]
    history: Mapping[str, Sequence[float]]
    config: Mapping[str, Any]

    def interval(self, name: str, of: Mapping[str, Any] | None = None) -> Interval:
        """A metric, or with ``of`` one of the calibration, with its interval."""
        values = self.metrics if of is None else of
        stored = values.get("intervals", {})
        low, high = (stored if of is not None else stored.get("values", {})).get(name) or (
            None,
        ) * 2
        estimate, low, high = (
            math.nan if value is None else float(value) for value in (values.get(name), low, high)
        )
        return Interval(estimate, low, high)


def write_comparison(
    path: Path,
    *,
    runs: Sequence[ComparedRun],
    classes: Sequence[str],
    split: str,
    pairs: Sequence[Pair],
    notes: Sequence[str] = (),
    thumbnails: Mapping[str, bytes] | None = None,
) -> Path:
    """Write the page of ``runs`` to ``path``: their metrics with intervals, the settings in which
    they differ, learning, ROC and precision-recall curves, tests of the ``pairs``, and the images
    on which they disagree with ``thumbnails`` (JPEG files by key).

    ``notes`` are sentences that stand on top.  Every name is escaped; figures and images are
    inside.  Raises ``ValueError`` for more runs than lines can be told apart.
    """
    if not 2 <= len(runs) <= MOST_RUNS:
        raise ValueError(f"a comparison is of 2 to {MOST_RUNS} runs, got {len(runs)}")
    names = [run.name for run in runs]
    title = " and ".join(names) if len(names) == 2 else f"{len(names)} runs"
    images = {len(run.predictions.keys) for run in runs}
    counted = " to ".join(str(count) for count in sorted({min(images), max(images)}))
    sections = [
        f"<header><h1>{escape(title)}</h1>"
        f'<p class="lead">{counted} {escape(split)} images, {_kind(runs, classes)}</p></header>',
        "".join(f'<div class="notes"><p>{escape(note)}</p></div>' for note in notes),
        _metrics(runs),
        _settings(runs),
        differences(names, pairs, several=runs[0].predictions.labels.dim() == 2),
        _learning(runs),
        _thresholds(runs, classes),
        disagreement_table([(r.name, r.predictions) for r in runs], classes, thumbnails or {}),
    ]
    with write_atomically(path) as file:
        file.write(document(title, sections))
    return path


def _kind(runs: Sequence[ComparedRun], classes: Sequence[str]) -> str:
    labels = runs[0].predictions.labels
    if labels.is_floating_point():
        return f"the number {escape(classes[0])}"
    return f"{len(classes)} {'findings' if labels.dim() == 2 else 'classes'}"


def different_settings(runs: Sequence[ComparedRun]) -> dict[str, list[str]]:
    """Settings that are not the same in all runs that have a configuration, by name."""
    known = [dict(_settings_of(run)) for run in runs]
    names = dict.fromkeys(name for values in known for name in values)
    found = {name: [values.get(name, "–") for values in known] for name in names}
    having = [position for position, values in enumerate(known) if values]
    return {
        name: values
        for name, values in found.items()
        if len({values[position] for position in having}) > 1
    }


def _settings_of(run: ComparedRun) -> Iterator[tuple[str, str]]:
    for part in _PARTS:
        for name, value in flatten(run.config.get(part, {})):
            if name not in _OF_THE_PLACE:
                yield name, value


def _metrics(runs: Sequence[ComparedRun]) -> str:
    shown = [name for name in _COLUMNS if any(run.metrics.get(name) is not None for run in runs)]
    plain = [(run.metrics.get("calibration") or {}).get("plain") for run in runs]
    errors = [name for name in _ERRORS if any(plain)]
    head = "".join(f'<th scope="col">{escape(TITLES.get(name, name))}</th>' for name in shown)
    head += "".join(f'<th scope="col">{_ERRORS[name]}</th>' for name in errors)
    rows = []
    for position, (run, calibration) in enumerate(zip(runs, plain, strict=True)):
        cells = [run.interval(name) for name in shown]
        cells += [run.interval(name, calibration or {}) for name in errors]
        rows.append(
            f'<tr><th scope="row">{swatch(position)} {escape(run.name)}</th>'
            f"<td>{len(run.predictions.keys)}</td>{''.join(map(cell, cells))}</tr>"
        )
    return (
        '<h2>Metrics</h2><div class="scroll"><table class="runs"><thead><tr>'
        f'<th class="left">run</th><th scope="col">images</th>{head}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></div><p class="soft">{escape(_made(runs))}</p>'
    )


def _made(runs: Sequence[ComparedRun]) -> str:
    """How the intervals were made: of one run, where all are alike."""
    ways = dict.fromkeys(
        f"{found['level']:.0%} confidence intervals, {found['method']} bootstrap, "
        f"{found['resamples']} resamples of {found['units']}"
        for run in runs
        if (found := run.metrics.get("intervals")) is not None
    )
    if not ways:
        return "No intervals were made."
    return (
        f"In brackets: {'; or '.join(ways)}. That two intervals overlap does not say that two runs "
        "are alike: they are of the same images, see the tests below."
    )


def _settings(runs: Sequence[ComparedRun]) -> str:
    if not any(run.config for run in runs):
        return ""
    different = different_settings(runs)
    if not different:
        return "<h2>Settings</h2><p>The runs were given the same settings.</p>"
    head = "".join(
        f'<th scope="col" class="left">{swatch(position)} {escape(run.name)}</th>'
        for position, run in enumerate(runs)
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="left">{escape(value)}</td>' for value in values)
        + "</tr>"
        for name, values in different.items()
    )
    return (
        '<h2>Settings that differ</h2><div class="scroll"><table class="runs"><thead><tr>'
        f'<th class="left">setting</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _learning(runs: Sequence[ComparedRun]) -> str:
    drawn = overlaid_learning(
        [(run.name, run.history) for run in runs],
        str(next((run.metrics["monitor"] for run in runs if "monitor" in run.metrics), "auc")),
    )
    if drawn is None:
        return ""
    tag = image_tag(drawn, "svg+xml", "Losses and monitored metric of every run by epoch")
    return f"<h2>Learning curves</h2><figure>{tag}</figure>"


def _thresholds(runs: Sequence[ComparedRun], classes: Sequence[str]) -> str:
    named = [(run.name, run.predictions) for run in runs]
    figures = []
    several = runs[0].predictions.labels.dim() == 2
    for column in (1,) if len(classes) == 2 and not several else range(len(classes)):
        drawn = overlaid_thresholds(named, column)
        if drawn is not None:
            name = classes[column]
            tag = image_tag(drawn, "svg+xml", f"ROC and precision-recall curves of {name}")
            figures.append(f"<h3>{escape(name)}</h3><figure>{tag}</figure>")
    if not figures:
        return ""
    versus = " of each finding" if several else ""
    if len(classes) > 2 and not several:
        versus = ", each class against the rest"
    return f"<h2>ROC and precision-recall{versus}</h2>{''.join(figures)}"


def restrict(predictions: Predictions, keys: Sequence[str]) -> Predictions:
    """The predictions of ``keys``, in that order."""
    place = {key: row for row, key in enumerate(predictions.keys)}
    rows = [place[key] for key in keys]
    probabilities = predictions.probabilities
    return dataclasses.replace(
        predictions,
        keys=tuple(keys),
        labels=predictions.labels[rows],
        logits=predictions.logits[rows],
        probabilities=None if probabilities is None else probabilities[rows],
    )
