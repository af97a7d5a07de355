"""The predictions of several findings per image as rows of the sortable table."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from fpt_fast.records import UNLABELLED, Predictions

COLUMNS = ("image", "true", "called", "verdict", "least of a truth")


@dataclass(frozen=True, slots=True)
class FindingsRow:
    """One image: ``labels`` and ``probabilities`` by finding."""

    key: str
    labels: tuple[int, ...]
    probabilities: tuple[float, ...]

    @property
    def least(self) -> float:
        """The lowest probability of what is true of a known finding; 1 where none is known."""
        truths = [
            value if label == 1 else 1.0 - value
            for label, value in zip(self.labels, self.probabilities, strict=True)
            if label != UNLABELLED
        ]
        return min(truths, default=1.0)

    @property
    def verdict(self) -> str:
        """``wrong`` where a known finding is called wrongly, ``""`` where none is known."""
        known = [
            (label == 1) == (value >= 0.5)
            for label, value in zip(self.labels, self.probabilities, strict=True)
            if label != UNLABELLED
        ]
        return ("right" if all(known) else "wrong") if known else ""

    def cells(self, names: Sequence[str]) -> str:
        """The cells behind the image's name: what is there, what is called, all probabilities."""
        there = [name for name, label in zip(names, self.labels, strict=True) if label == 1]
        called = [name for name, p in zip(names, self.probabilities, strict=True) if p >= 0.5]
        known = any(label != UNLABELLED for label in self.labels)
        cells = [
            f'<td class="left">{_names(there) if known else ""}</td>',
            f'<td class="left">{_names(called)}</td>',
            f'<td class="{self.verdict or "left"}">{self.verdict}</td>',
            f"<td>{f'{self.least:.3f}' if known else ''}</td>",
        ]
        for label, value in zip(self.labels, self.probabilities, strict=True):
            verdict = "" if label == UNLABELLED else _verdict(label, value)
            cells.append(f'<td class="{verdict}">{value:.3f}</td>')
        return "".join(cells)


def ranked_findings(predictions: Predictions) -> list[FindingsRow]:
    """Images with a wrong call first, and of each kind those with the least probable truth."""
    assert predictions.probabilities is not None
    rows = [
        FindingsRow(key, tuple(labels), tuple(values))
        for key, labels, values in zip(
            predictions.keys,
            predictions.labels.tolist(),
            predictions.probabilities.tolist(),
            strict=True,
        )
    ]
    return sorted(rows, key=lambda row: (row.verdict != "wrong", row.least))


def _verdict(label: int, probability: float) -> str:
    return "right" if (label == 1) == (probability >= 0.5) else "wrong"


def _names(names: Sequence[str]) -> str:
    # Each in an element of its own, by which the page filters.
    return ", ".join(f"<span>{escape(name)}</span>" for name in names or ["none"])
