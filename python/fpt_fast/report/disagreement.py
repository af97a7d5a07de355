"""The images that not all runs call alike, with what each run says of them."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fpt_fast.metrics import predicted_classes
from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.report.comparison_figures import swatch

# Rows beyond which a page becomes slow.
MOST_ROWS = 500


@dataclass(frozen=True, slots=True)
class _Call:
    """What one run calls an image; the same as the page has it, with the probability, or the grade
    that was predicted; whether it is right (None: nobody knows); the probability of what is true,
    or how far off a grade is, or the number that was predicted."""

    called: str
    said: str
    right: bool | None
    of_truth: float


@dataclass(frozen=True, slots=True)
class _Row:
    key: str
    truth: str
    calls: tuple[_Call, ...]
    furthest: float | None = None  # of numbers: the largest error of a run

    @property
    def spread(self) -> float:
        """How far apart the runs put what is true, or what they call where nobody knows."""
        values = [call.of_truth for call in self.calls]
        return max(values) - min(values)


def disagreement_table(
    runs: Sequence[tuple[str, Predictions]],
    classes: Sequence[str],
    thumbnails: Mapping[str, bytes],
    *,
    limit: int = MOST_ROWS,
) -> str:
    """One row an image (of several findings: an image and a finding) that the runs call
    differently, those first on which they are furthest apart; empty without images in common.

    Of a number per image all are rows for which the runs give different numbers."""
    common = common_keys([predictions for _, predictions in runs])
    if not common:
        return ""
    rows = _disagreements(runs, classes, common)
    valued = runs[0][1].labels.is_floating_point()
    unit = "calls of findings" if runs[0][1].labels.dim() == 2 else "images"
    said = f"The runs differ on {len(rows)} {unit}, of {len(common)} images that all have."
    if not rows:
        return f"<h2>Images on which they disagree</h2><p>{said}</p>"
    shown = rows[:limit]
    if len(shown) < len(rows):
        said += f" Here are the {len(shown)} on which they are furthest apart."
    columns = ("image", "true", "furthest off" if valued else "right", *(n for n, _ in runs))
    kind = (
        "Those whose numbers are furthest apart come first."
        if valued
        else "A number is the probability of what is called; the furthest apart in the probability "
        "of what is true come first."
    )
    marks = ("", "", "", *(f"{swatch(number)} " for number in range(len(runs))))
    heads = "".join(
        f'<th scope="col" class="left" aria-sort="none">{mark}<button type="button" '
        f'data-column="{position}">{escape(title)}</button></th>'
        for position, (title, mark) in enumerate(zip(columns, marks, strict=True), 1)
    )
    body = "".join(_table_row(row, thumbnails.get(row.key)) for row in shown)
    return (
        f"<h2>Images on which they disagree</h2><p>{said} {kind}</p>"
        '<form class="controls" hidden>'
        '<label>name <input type="search" name="key" data-column="1"></label>'
        f"{'' if valued else _truths(shown)}"
        '<output aria-live="polite"></output></form>'
        '<div class="scroll"><table class="predictions"><thead><tr><th scope="col">'
        f'<span class="hidden">picture</span></th>{heads}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def common_keys(predictions: Sequence[Predictions]) -> tuple[str, ...]:
    """Keys that all have, in the order of the first."""
    others = [set(p.keys) for p in predictions[1:]]
    return tuple(key for key in predictions[0].keys if all(key in other for other in others))


def most_disputed(
    predictions: Sequence[Predictions], classes: Sequence[str], count: int
) -> list[str]:
    """Keys of the first rows of the table, each once."""
    runs = [("", p) for p in predictions]
    rows = _disagreements(runs, classes, common_keys(predictions))
    return list(dict.fromkeys(row.key for row in rows))[:count]


def _disagreements(
    runs: Sequence[tuple[str, Predictions]], classes: Sequence[str], keys: Sequence[str]
) -> list[_Row]:
    rows = [
        row
        for row in _rows([predictions for _, predictions in runs], classes, keys)
        if len({call.called for call in row.calls}) > 1
    ]
    return sorted(rows, key=lambda row: -row.spread)


def _rows(
    runs: Sequence[Predictions], classes: Sequence[str], keys: Sequence[str]
) -> Iterator[_Row]:
    places = [{key: row for row, key in enumerate(p.keys)} for p in runs]
    guesses = [predicted_classes(p, len(classes)).tolist() for p in runs]
    numbers = [(p.logits if p.probabilities is None else p.probabilities).tolist() for p in runs]
    labels = runs[0].labels.tolist()
    for key in keys:
        at = [place[key] for place in places]
        label = labels[at[0]]
        said = [
            (guess[row], values[row])
            for guess, values, row in zip(guesses, numbers, at, strict=True)
        ]
        if isinstance(label, float):
            yield _number_row(key, label, [values[0] for _, values in said])
        elif isinstance(label, list):
            for column, (name, truth) in enumerate(zip(classes, label, strict=True)):
                calls = tuple(_finding(g[column], v[column], truth) for g, v in said)
                known = {1: "present", 0: "absent"}.get(truth, "unknown")
                yield _Row(key, f"{name}: {known}", calls)
        else:
            calls = tuple(_class(g, v, label, classes) for g, v in said)
            yield _Row(key, "" if label == UNLABELLED else classes[label], calls)


def _number_row(key: str, truth: float, values: Sequence[float]) -> _Row:
    calls = tuple(_Call(f"{v:.9g}", f"{v:.5g}", None, v) for v in values)
    if math.isnan(truth):
        return _Row(key, "", calls)
    return _Row(key, f"{truth:.5g}", calls, max(abs(value - truth) for value in values))


def _class(guess: int, values: Sequence[float], label: int, classes: Sequence[str]) -> _Call:
    right = None if label == UNLABELLED else guess == label
    if len(values) == 1:  # a predicted grade
        off = 0.0 if label == UNLABELLED else abs(values[0] - label)
        return _Call(classes[guess], f"{classes[guess]} {values[0]:.3f}", right, off)
    of_truth = values[guess if label == UNLABELLED else label]
    return _Call(classes[guess], f"{classes[guess]} {values[guess]:.3f}", right, of_truth)


def _finding(called: int, probability: float, truth: int) -> _Call:
    right = None if truth == UNLABELLED else bool(called) == (truth == 1)
    name = "called" if called else "not called"
    return _Call(name, f"{name} {probability:.3f}", right, probability)


def _truths(rows: Sequence[_Row]) -> str:
    options = "".join(
        f"<option>{escape(name)}</option>" for name in sorted({r.truth for r in rows})
    )
    return (
        '<label>true <select name="label" data-column="2"><option value="">all</option>'
        f"{options}</select></label>"
    )


def _table_row(row: _Row, thumbnail: bytes | None) -> str:
    picture = ""
    if thumbnail is not None:
        data = base64.b64encode(thumbnail).decode()
        picture = f'<img src="data:image/jpeg;base64,{data}" alt="" loading="lazy">'
    judged = [call.right for call in row.calls if call.right is not None]
    right = f"{sum(judged)} of {len(judged)}" if judged else ""
    if row.furthest is not None:
        right = f"{row.furthest:.5g}"
    return (
        f'<tr><td class="picture">{picture}</td><th scope="row">{escape(row.key)}</th>'
        f'<td class="left">{escape(row.truth)}</td><td class="left">{right}</td>'
        f"{''.join(map(_call, row.calls))}</tr>"
    )


def _call(call: _Call) -> str:
    # A sign as well as a colour, for those who do not tell the two apart.
    kind, sign = {True: ("right", " ✓"), False: ("wrong", " ✗"), None: ("", "")}[call.right]
    return f'<td class="left {kind}">{escape(call.said)}{sign}</td>'
