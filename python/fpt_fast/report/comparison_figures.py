"""Curves of several runs in one figure: a run has one colour and dash everywhere."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fpt_fast.metrics import spoken
from fpt_fast.records import Predictions
from fpt_fast.report.figures import COLOURS, DASHES, line, name_axes, render, short

# Beyond it, colours and dashes repeat.
MOST_RUNS = len(COLOURS) * len(DASHES)
_SWATCH_DASHES = {"-": "", "--": "7 3", "-.": "7 3 2 3", ":": "2 2"}


def swatch(number: int) -> str:
    """A piece of the line of run ``number``, to stand beside its name."""
    dash = _SWATCH_DASHES[DASHES[number // len(COLOURS) % len(DASHES)]]
    return (
        '<svg class="swatch" width="22" height="8" aria-hidden="true"><path d="M1 4h20" '
        f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="3" '
        f'stroke-dasharray="{dash}"/></svg>'
    )


def overlaid_learning(
    runs: Sequence[tuple[str, Mapping[str, Sequence[float]]]], monitor: str
) -> bytes | None:
    """Training loss, validation loss and the monitored metric by epoch, a line a run: SVG.

    The runs are names and columns of ``history.csv``; None where no run has a history.
    """
    titles = {
        "loss": "training loss",
        "val_loss": "validation loss",
        f"val_{monitor}": f"validation {spoken(monitor)}",
    }
    shown = [name for name in titles if any(_has(history, name) for _, history in runs)]
    if not shown:
        return None

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, len(shown), squeeze=False)[0]
        for axis, column in zip(axes, shown, strict=True):
            for number, (name, history) in enumerate(runs):
                if not _has(history, column):
                    continue
                rows = [at for at, value in enumerate(history[column]) if not math.isnan(value)]
                epochs = [history["epoch"][at] + 1 for at in rows]
                line(axis, epochs, [history[column][at] for at in rows], number, short(name))
            axis.set_title(titles[column])
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, axes)

    return render(draw, (3.4 * len(shown), 3.2 + 0.25 * -(-len(runs) // 3)))


def overlaid_thresholds(runs: Sequence[tuple[str, Predictions]], column: int) -> bytes | None:
    """ROC and precision-recall curves of class (or finding) ``column`` against the rest: SVG.

    None where no run has probabilities and images of both kinds.
    """
    from sklearn.metrics import (
        average_precision_score,
        precision_recall_curve,
        roc_auc_score,
        roc_curve,
    )

    curves = []
    for number, (name, predictions) in enumerate(runs):
        if predictions.probabilities is None:
            continue
        labels = predictions.labels.numpy()
        told = labels[:, column] if labels.ndim == 2 else labels
        known = told >= 0
        positive = told[known] == (1 if labels.ndim == 2 else column)
        if positive.any() and not positive.all():
            curves.append(
                (number, name, positive, predictions.probabilities[known, column].numpy())
            )
    if not curves:
        return None

    def draw(figure: Any) -> None:
        roc, recalls = figure.subplots(1, 2)
        roc.plot([0, 1], [0, 1], color="#9ca3af", linewidth=1, linestyle=":")
        for number, name, positive, score in curves:
            area, average = roc_auc_score(positive, score), average_precision_score(positive, score)
            label = f"{short(name)}  {area:.3f}  {average:.3f}"
            false_positive, true_positive, _ = roc_curve(positive, score)
            line(roc, false_positive, true_positive, number, label, marker=False)
            precision, recall, _ = precision_recall_curve(positive, score)
            line(recalls, recall, precision, number, label, marker=False)
        for share in {float(positive.mean()) for _, _, positive, _ in curves}:
            recalls.axhline(share, color="#9ca3af", linewidth=1, linestyle=":")
        name_axes(roc, "false positive rate", "true positive rate")
        name_axes(recalls, "recall (sensitivity)", "precision")
        _legend(figure, [roc], columns=2, title="run, AUC, average precision")

    return render(draw, (9.0, 4.1 + 0.25 * -(-len(curves) // 2)))


def _has(history: Mapping[str, Sequence[float]], column: str) -> bool:
    return not all(map(math.isnan, history.get(column, ())))


def _legend(figure: Any, axes: Sequence[Any], columns: int = 3, title: str | None = None) -> None:
    """One for all axes, below them: each run once."""
    named = {
        name: handle
        for axis in axes
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        named.values(),
        named.keys(),
        loc="outside lower center",
        ncols=columns,
        title=title,
        alignment="left",
    )
