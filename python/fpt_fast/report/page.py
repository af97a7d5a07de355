"""``report.html``: one page on a run, which needs no network and no other file."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fpt_fast.files import write_atomically
from fpt_fast.metrics import Metrics
from fpt_fast.records import UNLABELLED, Predictions, TokenExample, TrainingHistory
from fpt_fast.report.figures import (
    learning_curves,
    reliability_diagram,
    threshold_curves,
    value_scatter,
)
from fpt_fast.report.files import check_classes
from fpt_fast.report.html import document, flatten, image_tag
from fpt_fast.report.predictions_table import predictions_table
from fpt_fast.report.tokens import draw_attention, draw_tokens
from fpt_fast.report.trust import (
    TITLES,
    calibration_table,
    class_table,
    finding_calibration_table,
    grading_table,
    metric_cards,
    operating_table,
)
from fpt_fast.trust import Assessment
from fpt_fast.words import counted

REPORT_FILE = "report.html"


def write_report(
    run_dir: str | Path,
    *,
    history: TrainingHistory | None,
    predictions: Predictions,
    classes: Sequence[str],
    assessment: Assessment,
    examples: Sequence[TokenExample] = (),
    thumbnails: Mapping[str, bytes] | None = None,
    settings: Mapping[str, Any] | None = None,
    split: str = "test",
) -> Path:
    """Write ``run_dir/report.html`` and return its path.

    The page shows the ``assessment`` of ``split``, learning, ROC and precision-recall curves, the
    confusion matrix, a table by class, ``examples`` with their kept tokens, every prediction with
    its thumbnail (JPEG files by key, of some images), and ``settings`` (name to value; a mapping
    inside becomes dotted names).  Every name is escaped; figures and images are
    inside.
    Raises ``ValueError`` where classes, predictions, metrics or examples do not fit together.
    """
    metrics, intervals = assessment.metrics, assessment.intervals
    check_classes(classes, predictions, metrics)
    kind = f"{len(classes)} {'findings' if predictions.labels.dim() == 2 else 'classes'}"
    if predictions.labels.is_floating_point():
        kind = f"the number {escape(classes[0])}"
    folder = Path(run_dir)
    name = folder.resolve().name
    sections = [
        _header(name, split, len(predictions.keys), history, kind),
        metric_cards(metrics, intervals),
        _notes(metrics, classes),
        _learning(history),
        _roc(predictions, classes, metrics),
        _scatter(predictions, classes),
        _confusion(metrics, classes),
        grading_table(assessment.grading, metrics, classes),
        class_table(metrics, intervals, classes),
        _calibration(assessment),
        finding_calibration_table(assessment.by_finding, classes),
        operating_table(assessment.points, classes),
        _examples(examples, classes, split),
        predictions_table(predictions, classes, thumbnails or {}),
        _settings(settings or {}),
    ]
    path = folder / REPORT_FILE
    with write_atomically(path) as file:
        file.write(document(name, sections))
    return path


def _header(
    name: str,
    split: str,
    images: int,
    history: TrainingHistory | None,
    kind: str,
) -> str:
    parts = [counted(images, f"{escape(split)} image") + f", {kind}"]
    if history is not None and history.epochs:
        parts.append(f"{counted(len(history.epochs), 'epoch')} trained")
        if history.best_epoch is not None:
            value = history.best_value
            reached = (
                ""
                if value is None
                else f" ({escape(TITLES.get(history.monitor, history.monitor))} {value:.3f})"
            )
            parts.append(f"best on validation: epoch {history.best_epoch + 1}{reached}")
    return f'<header><h1>{escape(name)}</h1><p class="lead">{"; ".join(parts)}</p></header>'


def _notes(metrics: Metrics, classes: Sequence[str]) -> str:
    notes = list(metrics.notes)
    if metrics.missing_classes:
        names = ", ".join(f"“{classes[label]}”" for label in metrics.missing_classes)
        of, kind = ("with", "findings") if metrics.confusion.dim() == 3 else ("of", "classes")
        notes[0] = f"No image {of} {names} in this split; averages are over the {kind} present."
    if not notes:
        return ""
    return '<div class="notes">' + "".join(f"<p>{escape(note)}</p>" for note in notes) + "</div>"


def _learning(history: TrainingHistory | None) -> str:
    if history is None or not history.epochs:
        return ""
    picture = image_tag(learning_curves(history), "svg+xml", "Loss and validation metrics by epoch")
    return f"<h2>Learning curves</h2><figure>{picture}</figure>"


def _roc(predictions: Predictions, classes: Sequence[str], metrics: Metrics) -> str:
    if predictions.probabilities is None or all(math.isnan(row.auc) for row in metrics.per_class):
        return ""
    picture = image_tag(
        threshold_curves(predictions, classes, metrics),
        "svg+xml",
        "ROC and precision-recall curves",
    )
    versus = "" if len(classes) == 2 else ", each class against the rest"
    if predictions.labels.dim() == 2:
        versus = " of each finding"
    return f"<h2>ROC and precision-recall{versus}</h2><figure>{picture}</figure>"


def _calibration(assessment: Assessment) -> str:
    calibration = assessment.calibration
    if calibration is None:
        return ""
    picture = image_tag(reliability_diagram(calibration), "svg+xml", "Reliability diagram")
    return f"<h2>Calibration</h2>{calibration_table(calibration)}<figure>{picture}</figure>"


def _scatter(predictions: Predictions, classes: Sequence[str]) -> str:
    if not predictions.labels.is_floating_point():
        return ""
    picture = image_tag(
        value_scatter(predictions, classes[0]), "svg+xml", "Predicted numbers against true ones"
    )
    return f"<h2>Predicted against true</h2><figure>{picture}</figure>"


def _confusion(metrics: Metrics, classes: Sequence[str]) -> str:
    if not metrics.per_class:
        return ""
    if metrics.confusion.dim() == 3:
        return _calls(metrics, classes)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in classes)
    rows = []
    for name, counts in zip(classes, metrics.confusion.tolist(), strict=True):
        total = sum(counts)
        cells = "".join(_shaded(count, count / total if total else 0.0) for count in counts)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        '<h2>Confusion matrix</h2><div class="scroll"><table class="confusion">'
        f'<thead><tr><th class="left soft">true ↓ predicted →</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">Images; the shade is the share of the row.</p>'
    )


def _calls(metrics: Metrics, findings: Sequence[str]) -> str:
    """Of several findings per image: how often each is called, with and without it."""
    head = "".join(
        f'<th scope="col">{title}</th>'
        for title in ("with, called", "with, not called", "without, called", "without, not called")
    )
    rows = []
    for name, ((calm, alarms), (missed, hits)) in zip(
        findings, metrics.confusion.tolist(), strict=True
    ):
        cells = "".join(f"<td>{count}</td>" for count in (hits, missed, alarms, calm))
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        '<h2>Calls at a probability of 0.5</h2><div class="scroll"><table><thead><tr>'
        f'<th class="left">finding</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        '</div><p class="soft">Images of which the finding is known.</p>'
    )


def _shaded(count: int, share: float) -> str:
    # The shade over white, and whichever of black and white stands out more against it.
    red, green, blue = (share * part + (1 - share) * 255 for part in (0, 114, 178))
    lightness = sum(
        weight * (part / 255) ** 2.2
        for weight, part in ((0.2126, red), (0.7152, green), (0.0722, blue))
    )
    ink = "#fff" if lightness < 0.18 else "#000"
    return f'<td style="background:rgba(0,114,178,{share:.3f});color:{ink}">{count}</td>'


def _examples(examples: Sequence[TokenExample], classes: Sequence[str], split: str) -> str:
    if not examples:
        return ""
    figures = []
    for example in examples:
        picture = draw_tokens(example)
        looked, said = "", ""
        if example.weights is not None:
            attention = draw_attention(example)
            looked = image_tag(attention.marked, "png", "the image with where the prompts look")
            said = f" The patch looked at most has {attention.highest:.1%} of the attention."
        figures.append(
            f'<figure class="example"><h3>{escape(example.key)}</h3><div class="pair">'
            f"{image_tag(picture.plain, 'jpeg', 'the image')}"
            f"{image_tag(picture.marked, 'png', 'the image with its kept patches')}{looked}"
            f"</div><figcaption>{_verdict(example, classes)} Patches are kept by "
            f"{picture.lowest:.0%} to {picture.highest:.0%} of layers and heads.{said}"
            "</figcaption></figure>"
        )
    first = examples[0]
    third = (
        " On the right, where the prompts look: their attention on each patch, the mean of layers, "
        "heads and prompts."
        if first.weights is not None
        else ""
    )
    return (
        "<h2>Kept tokens</h2>"
        f"<p>Some {escape(split)} images, and beside them what was kept: the colour of a patch is "
        f"the share of {first.index.shape[0]} layers × {first.index.shape[1]} heads that keep it; "
        f"frames are around the highest patches.{third}</p>"
        '<p class="scale">least <span class="bar"></span> most</p>' + "".join(figures)
    )


def _verdict(example: TokenExample, classes: Sequence[str]) -> str:
    """Truth and prediction of an example, as HTML."""
    if example.findings:
        return _findings_verdict(example, classes)
    if example.output is not None:
        return _number_verdict(example, example.output, classes)
    guess = int(example.probabilities.argmax())
    sure = f"{float(example.probabilities[guess]):.1%}"
    predicted = f"predicted {escape(classes[guess])} ({sure})"
    return _judged(predicted, guess, example.label, classes)


def _judged(predicted: str, guess: int, label: int, classes: Sequence[str]) -> str:
    if label == UNLABELLED:
        return f"<strong>{predicted}</strong>."
    mark = "right" if guess == label else "wrong"
    truth = "" if guess == label else f"; it is {escape(classes[label])}"
    return f'<strong class="{mark}">{predicted}: {mark}</strong>{truth}.'


def _number_verdict(example: TokenExample, output: float, classes: Sequence[str]) -> str:
    if example.grade is None:
        predicted = f"predicted {output:.5g}"
        if example.value is None:
            return f"<strong>{predicted}</strong>."
        off = f"off by {abs(output - example.value):.3g}"
        return f"<strong>{predicted}</strong>; it is {example.value:.5g}, {off}."
    predicted = f"predicted {escape(classes[example.grade])} ({output:.2f})"
    return _judged(predicted, example.grade, example.label, classes)


def _findings_verdict(example: TokenExample, findings: Sequence[str]) -> str:
    rows = zip(findings, example.findings, example.probabilities.tolist(), strict=True)
    said = []
    for name, label, probability in rows:
        if label == 1 or probability >= 0.5:
            truth = {1: "present", 0: "absent"}.get(label, "unknown")
            said.append(f"{escape(name)} {probability:.1%} ({truth})")
    return f"<strong>{'; '.join(said) or 'no finding, and none called'}</strong>."


def _settings(settings: Mapping[str, Any]) -> str:
    if not settings:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
        for name, value in flatten(settings)
    )
    return f'<h2>Settings</h2><table class="settings"><tbody>{rows}</tbody></table>'
