"""The predictions as a table that a browser sorts and filters; without scripts it is a table."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.report.findings_table import COLUMNS as FINDING_COLUMNS
from fpt_fast.report.findings_table import FindingsRow, findings_cells, ranked_findings

# Rows beyond which a page becomes slow; predictions.csv has them all.
MOST_ROWS = 2000
_COLUMNS = ("image", "true", "predicted", "verdict", "its probability", "that of the truth")


@dataclass(frozen=True, slots=True)
class _Row:
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


def predictions_table(
    predictions: Predictions,
    classes: Sequence[str],
    thumbnails: Mapping[str, bytes],
    *,
    limit: int = MOST_ROWS,
) -> str:
    """One row an image, the worst first: picture, key, truth, prediction, two probabilities; of
    several findings per image what is there, what is called, and the probability of each.

    ``thumbnails`` are JPEG files by key, of some images or none.  Beyond ``limit`` rows the
    surest ones are left out, and the page says so.
    """
    several = predictions.labels.dim() == 2
    rows = ranked_findings(predictions) if several else _ranked(predictions)
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
    columns = _COLUMNS if not several else (*FINDING_COLUMNS, *classes)
    buttons = "".join(
        f'<th scope="col" class="{"left" if position < 5 else ""}" aria-sort="none">'
        f'<button type="button" data-column="{position}">{escape(title)}</button></th>'
        for position, title in enumerate(columns, 1)
    )
    body = "".join(_row(row, classes, thumbnails.get(row.key)) for row in shown)
    return (
        '<h2 id="predictions">Predictions</h2>'
        f"{_controls((*classes, 'none') if several else classes)}{left_out}"
        '<div class="scroll"><table class="predictions"><thead><tr><th scope="col">'
        f'<span class="hidden">picture</span></th>{buttons}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def worst_first(predictions: Predictions) -> list[str]:
    """Keys in the order of the table; empty for regressions, which have no table."""
    if predictions.labels.dim() == 2:
        return [row.key for row in ranked_findings(predictions)]
    return [row.key for row in _ranked(predictions)]


def _ranked(predictions: Predictions) -> list[_Row]:
    """Wrong ones first, the surest of them before; then right ones, the least sure before."""
    if predictions.probabilities is None:
        return []
    rows = []
    for key, label, values in zip(
        predictions.keys,
        predictions.labels.tolist(),
        predictions.probabilities.tolist(),
        strict=True,
    ):
        guess = max(range(len(values)), key=values.__getitem__)
        of_truth = values[label] if label != UNLABELLED else values[guess]
        rows.append(_Row(key, label, guess, values[guess], of_truth))
    return sorted(rows, key=lambda row: (row.verdict != "wrong", row.of_truth))


def _controls(classes: Sequence[str]) -> str:
    options = "".join(f"<option>{escape(name)}</option>" for name in classes)
    every = '<option value="">all</option>'
    return (
        '<form class="controls" hidden>'
        '<label>name <input type="search" name="key" data-column="1"></label>'
        f'<label>true <select name="label" data-column="2">{every}{options}</select></label>'
        f'<label>predicted <select name="guess" data-column="3">{every}{options}</select></label>'
        f'<label>verdict <select name="verdict" data-column="4">{every}<option>wrong</option>'
        '<option>right</option></select></label><output aria-live="polite"></output></form>'
    )


def _row(row: _Row | FindingsRow, classes: Sequence[str], thumbnail: bytes | None) -> str:
    cells = findings_cells(row, classes) if isinstance(row, FindingsRow) else _cells(row, classes)
    picture = ""
    if thumbnail is not None:
        data = base64.b64encode(thumbnail).decode()
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="" loading="lazy">'
    return (
        f'<tr><td class="picture">{picture}</td><th scope="row">{escape(row.key)}</th>{cells}</tr>'
    )


def _cells(row: _Row, classes: Sequence[str]) -> str:
    label = "" if row.label == UNLABELLED else escape(classes[row.label])
    of_truth = "" if row.label == UNLABELLED else f"{row.of_truth:.3f}"
    return (
        f'<td class="left">{label}</td><td class="left">{escape(classes[row.guess])}</td>'
        f'<td class="{row.verdict or "left"}">{row.verdict}</td>'
        f"<td>{row.confidence:.3f}</td><td>{of_truth}</td>"
    )
