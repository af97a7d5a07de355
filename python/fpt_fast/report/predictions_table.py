"""The predictions as a table that a browser sorts and filters; without scripts it is a table."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Protocol

from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.report.findings_table import COLUMNS as FINDING_COLUMNS
from fpt_fast.report.findings_table import ranked_findings
from fpt_fast.report.numbers_table import (
    GRADE_COLUMNS,
    VALUE_COLUMNS,
    ranked_grades,
    ranked_values,
)

# Rows beyond which a page becomes slow; predictions.csv has them all.
MOST_ROWS = 2000
_COLUMNS = ("image", "true", "predicted", "verdict", "its probability", "that of the truth")


class _Row(Protocol):
    """One image of the table."""

    @property
    def key(self) -> str: ...

    def cells(self, names: Sequence[str]) -> str:
        """What stands behind the image's name, as HTML."""
        ...


@dataclass(frozen=True, slots=True)
class _ClassRow:
    key: str
    label: int
    guess: int
    confidence: float
    of_truth: float

    @property
    def verdict(self) -> str:
        if self.label == UNLABELLED:
            return ""
        return "right" if self.label == self.guess else "wrong"

    def cells(self, names: Sequence[str]) -> str:
        label = "" if self.label == UNLABELLED else escape(names[self.label])
        of_truth = "" if self.label == UNLABELLED else f"{self.of_truth:.3f}"
        return (
            f'<td class="left">{label}</td><td class="left">{escape(names[self.guess])}</td>'
            f'<td class="{self.verdict or "left"}">{self.verdict}</td>'
            f"<td>{self.confidence:.3f}</td><td>{of_truth}</td>"
        )


def predictions_table(
    predictions: Predictions,
    classes: Sequence[str],
    thumbnails: Mapping[str, bytes],
    *,
    limit: int = MOST_ROWS,
) -> str:
    """One row an image, the worst first: picture, key, truth, prediction, two probabilities; of
    several findings per image what is there, what is called, and the probability of each; of
    grades and numbers the error.

    ``thumbnails`` are JPEG files by key, of some images or none.  Beyond ``limit`` rows the
    best ones are left out, and the page says so.
    """
    rows = _ranked(predictions, len(classes))
    if not rows:
        return ""
    shown = rows[:limit]
    left_out = (
        ""
        if len(shown) == len(rows)
        else (
            f'<p class="soft">The {len(shown)} worst of {len(rows)}; predictions.csv has all.</p>'
        )
    )
    columns, names, left = _columns(predictions, classes)
    buttons = "".join(
        f'<th scope="col" class="{"left" if position <= left else ""}" aria-sort="none">'
        f'<button type="button" data-column="{position}">{escape(title)}</button></th>'
        for position, title in enumerate(columns, 1)
    )
    body = "".join(_row(row, classes, thumbnails.get(row.key)) for row in shown)
    return (
        f'<h2 id="predictions">Predictions</h2>{_explained(predictions)}'
        f"{_controls(names)}{left_out}"
        '<div class="scroll"><table class="predictions"><thead><tr><th scope="col">'
        f'<span class="hidden">picture</span></th>{buttons}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def worst_first(predictions: Predictions, num_classes: int) -> list[str]:
    """Keys in the order of the table."""
    return [row.key for row in _ranked(predictions, num_classes)]


def _ranked(predictions: Predictions, num_classes: int) -> Sequence[_Row]:
    """All rows, the worst first."""
    if predictions.labels.is_floating_point():
        return ranked_values(predictions)
    if predictions.probabilities is None:
        return ranked_grades(predictions, num_classes)
    if predictions.labels.dim() == 2:
        return ranked_findings(predictions)
    return _ranked_classes(predictions)


def _columns(
    predictions: Predictions, classes: Sequence[str]
) -> tuple[Sequence[str], Sequence[str], int]:
    """Titles behind the picture, the names that true and predicted are filtered by, and how many
    titles stand on the left of their column."""
    if predictions.labels.is_floating_point():
        return VALUE_COLUMNS, (), 1
    if predictions.probabilities is None:
        return GRADE_COLUMNS, classes, 4
    if predictions.labels.dim() == 2:
        return (*FINDING_COLUMNS, *classes), (*classes, "none"), 4
    return _COLUMNS, classes, 4


def _explained(predictions: Predictions) -> str:
    if predictions.probabilities is not None:
        return ""
    what = "number" if predictions.labels.is_floating_point() else "grade (0, 1, ... by class)"
    return (
        f'<p class="soft">The error is the predicted {what} less the true one; those furthest off '
        "come first.</p>"
    )


def _ranked_classes(predictions: Predictions) -> list[_ClassRow]:
    """Wrong ones first, the surest of them before; then right ones, the least sure before."""
    assert predictions.probabilities is not None
    rows = []
    for key, label, values in zip(
        predictions.keys,
        predictions.labels.tolist(),
        predictions.probabilities.tolist(),
        strict=True,
    ):
        guess = max(range(len(values)), key=values.__getitem__)
        of_truth = values[label] if label != UNLABELLED else values[guess]
        rows.append(_ClassRow(key, label, guess, values[guess], of_truth))
    return sorted(rows, key=lambda row: (row.verdict != "wrong", row.of_truth))


def _controls(names: Sequence[str]) -> str:
    options = "".join(f"<option>{escape(name)}</option>" for name in names)
    every = '<option value="">all</option>'
    by_name = (
        f'<label>true <select name="label" data-column="2">{every}{options}</select></label>'
        f'<label>predicted <select name="guess" data-column="3">{every}{options}</select></label>'
        f'<label>verdict <select name="verdict" data-column="4">{every}<option>wrong</option>'
        "<option>right</option></select></label>"
    )
    return (
        '<form class="controls" hidden>'
        '<label>name <input type="search" name="key" data-column="1"></label>'
        f'{by_name if names else ""}<output aria-live="polite"></output></form>'
    )


def _row(row: _Row, classes: Sequence[str], thumbnail: bytes | None) -> str:
    picture = ""
    if thumbnail is not None:
        data = base64.b64encode(thumbnail).decode()
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="" loading="lazy">'
    return (
        f'<tr><td class="picture">{picture}</td><th scope="row">{escape(row.key)}</th>'
        f"{row.cells(classes)}</tr>"
    )
