"""Predictions of grades, or of a number per image, as rows of the sortable table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fpt_fast.metrics import predicted_classes
from fpt_fast.records import UNLABELLED, Predictions

GRADE_COLUMNS = ("image", "true", "predicted", "verdict", "grade", "error", "off by")
VALUE_COLUMNS = ("image", "true", "predicted", "error", "off by")


@dataclass(frozen=True, slots=True)
class ValueRow:
    """One image: the true number (NaN where unknown) and the predicted one."""

    key: str
    truth: float
    value: float

    @property
    def off(self) -> float:
        """How far off the prediction is; below 0 where nobody knows."""
        return -1.0 if math.isnan(self.truth) else abs(self.value - self.truth)

    def cells(self, names: Sequence[str]) -> str:
        """The cells behind the image's name: true, predicted, error, and how large that is."""
        truth = "" if math.isnan(self.truth) else f"{self.truth:.6g}"
        return f"<td>{truth}</td><td>{self.value:.6g}</td>{self.error_cells()}"

    def error_cells(self) -> str:
        """The error, predicted less true, with its sign and without."""
        if math.isnan(self.truth):
            return "<td></td><td></td>"
        return f"<td>{self.value - self.truth:.5g}</td><td>{self.off:.5g}</td>"


@dataclass(frozen=True, slots=True)
class GradeRow(ValueRow):
    """The same of an output that ``guess`` was graded by."""

    label: int
    guess: int

    def cells(self, names: Sequence[str]) -> str:
        """The cells behind the image's name: both grades, verdict, output, and its error."""
        verdict, label = "", ""
        if self.label != UNLABELLED:
            verdict = "right" if self.label == self.guess else "wrong"
            label = escape(names[self.label])
        return (
            f'<td class="left">{label}</td><td class="left">{escape(names[self.guess])}</td>'
            f'<td class="{verdict or "left"}">{verdict}</td><td>{self.value:.3f}</td>'
            f"{self.error_cells()}"
        )


def ranked_values(predictions: Predictions) -> list[ValueRow]:
    """Numbers of images, those furthest off first."""
    rows = [
        ValueRow(key, truth, value)
        for key, truth, value in zip(
            predictions.keys,
            predictions.labels.tolist(),
            predictions.logits[:, 0].tolist(),
            strict=True,
        )
    ]
    return sorted(rows, key=lambda row: -row.off)


def ranked_grades(predictions: Predictions, num_classes: int) -> list[GradeRow]:
    """Grades of images, those furthest off first."""
    rows = [
        GradeRow(key, math.nan if label == UNLABELLED else float(label), value, label, guess)
        for key, label, guess, value in zip(
            predictions.keys,
            predictions.labels.tolist(),
            predicted_classes(predictions, num_classes).tolist(),
            predictions.logits[:, 0].tolist(),
            strict=True,
        )
    ]
    return sorted(rows, key=lambda row: -row.off)
