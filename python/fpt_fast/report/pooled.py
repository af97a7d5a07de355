"""What a cross-validation says of its pooled out-of-fold predictions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fpt_fast.metrics import spoken
from fpt_fast.trust import Assessment, Interval

# Metrics that the table shows, where there are such.
_SHOWN = ("auc", "ap", "accuracy", "f1", "kappa", "mae", "rmse", "r2")


@dataclass(frozen=True, slots=True, eq=False)
class PooledRow:
    """One model setting in one division of the data: the folder of its pooled predictions (below
    that of the cross-validation), the images in it, and what is said of them."""

    name: str
    images: int
    assessment: Assessment


def pooled_markdown(rows: Sequence[PooledRow]) -> str:
    """The pooled metrics as a Markdown table, and how they differ from mean and spread."""
    columns = [name for name in _SHOWN if any(name in row.assessment for row in rows)]
    head = ["pooled predictions", "images", *map(spoken, columns)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        intervals = row.assessment.intervals
        cells = [row.name, str(row.images)]
        cells += [
            _cell(row.assessment[name], None if intervals is None else intervals[name])
            for name in columns
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *_explanation(rows)]
    return "\n".join(lines) + "\n"


def _explanation(rows: Sequence[PooledRow]) -> list[str]:
    intervals = rows[0].assessment.intervals
    drawn = "" if intervals is None else f"In brackets: {intervals.describe()}. "
    return [
        "Mean ± standard deviation is over models, each on the test images of its own fold: how "
        "much a figure moves with the training and with which few images are tested. It is no "
        "error of the mean, since folds share most of their training images.",
        "",
        f"Pooled: every image once, predicted by the model that had not seen it. {drawn}They hold "
        "the models fixed, and so leave out what another training would change. The pooled AUC "
        "ranks images that different models scored against one another: where their probabilities "
        "are not on one scale it is below the mean, and then the mean says more of a single model.",
    ]


def _cell(value: float, interval: Interval | None) -> str:
    if math.isnan(value):
        return "-"
    if interval is None or math.isnan(interval.low):
        return f"{value:.4f}"
    return f"{value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"
