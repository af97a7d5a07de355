"""Two models on the same images: DeLong's test of the areas, paired intervals of the rest."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fpt_fast.metrics import is_labelled, spoken
from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.trust.bootstrap import Bootstrap, Interval
from fpt_fast.trust.delong import AreaDifference, compare_areas, compare_macro_areas
from fpt_fast.trust.resampled import Floats, make_resampler
from fpt_fast.words import counted

# Images with and without, which DeLong's test takes at least.
_FEWEST = 2


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """The first model against the second on ``images`` images.

    ``auc`` is DeLong's test of the (macro) areas and ``per_class`` of each class against the
    rest; None for a regression, or where a class has fewer than two images.  Of several findings
    per image ``per_class`` is of each finding, and ``auc`` None: their areas share images.
    ``differences`` are first less second by metric, with paired bootstrap intervals, which draw
    ``units`` (images, or patients); ``first`` and ``second`` the metrics themselves.
    ``untested`` says of each class or finding why it has no test (None: it has one; empty for a
    regression).
    """

    images: int
    classes: tuple[str, ...]
    level: float
    first: dict[str, float]
    second: dict[str, float]
    differences: dict[str, Interval]
    auc: AreaDifference | None
    per_class: tuple[AreaDifference | None, ...]
    units: str = "images"
    untested: tuple[str | None, ...] = ()

    def __str__(self) -> str:
        """A table in plain text: DeLong's tests, then the other metrics."""
        said = f"differences are first less second, with {self.level:.0%} intervals"
        lines = [f"{counted(self.images, 'image')}; {said}", *self.area_lines()]
        for name, interval in self.differences.items():
            lines.append(
                f"{spoken(name)}: {self.first[name]:.4f} against {self.second[name]:.4f}, "
                f"difference {interval} (paired bootstrap"
                f"{'' if self.units == 'images' else f' of {self.units}'})"
            )
        if self.units != "images" and any(area is not None for area in (self.auc, *self.per_class)):
            lines.append(f"note: DeLong's test takes images, not {self.units}, as independent")
        return "\n".join(lines)

    def area_lines(self) -> list[str]:
        """DeLong's tests in plain text, a line each: of all classes, then of each, or why none."""
        lines = [] if self.auc is None else [_row("AUC", self.auc)]
        if len(self.classes) > 2 or self.auc is None:
            reasons = self.untested or (None,) * len(self.classes)
            for name, row, why in zip(self.classes, self.per_class, reasons, strict=True):
                if row is not None:
                    lines.append(_row(f"AUC of {name}", row))
                elif why is not None:
                    lines.append(f"AUC of {name}: not compared, {why}")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "images": self.images,
            "level": self.level,
            "units": self.units,
            "first": self.first,
            "second": self.second,
            "differences": {
                name: [_number(row.estimate), *row.to_json()]
                for name, row in self.differences.items()
            },
            "delong": None if self.auc is None else self.auc.to_json(),
            "delong_per_class": {
                name: None if row is None else row.to_json()
                for name, row in zip(self.classes, self.per_class, strict=True)
            },
        }


def compare_predictions(
    first: Predictions,
    second: Predictions,
    classes: Sequence[str],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> Comparison:
    """Compare two models' predictions of the same images, in any order.

    DeLong's test takes images as independent; with ``groups`` (the patient of each image of
    ``first``) read the bootstrap intervals instead, which draw patients.  Raises ``ValueError``
    where the images or their labels differ, or one is a regression and the other is not.
    """
    second = _in_order_of(first, second)
    if (first.probabilities is None) != (second.probabilities is None):
        raise ValueError(
            "one of the two is a regression and the other is not; compare like with like"
        )
    one, other = make_resampler(first, len(classes)), make_resampler(second, len(classes))
    names = one.value_names

    def differences(counts: NDArray[np.int64]) -> Floats:  # [R, metrics]
        ours, theirs = one(counts).values, other(counts).values
        return np.stack([ours[name] - theirs[name] for name in names], axis=1)

    bootstrap = Bootstrap(first, level=level, resamples=resamples, seed=seed, groups=groups)
    intervals, _ = bootstrap.intervals(differences)
    all_images = np.ones((1, len(one.labels)), dtype=np.int64)
    auc, per_class = _areas(first, second, classes, level)
    return Comparison(
        images=len(one.labels),
        classes=tuple(classes),
        level=level,
        first={name: float(v[0]) for name, v in one(all_images).values.items()},
        second={name: float(v[0]) for name, v in other(all_images).values.items()},
        differences=dict(zip(names, intervals, strict=True)),
        auc=auc,
        per_class=per_class,
        units=bootstrap.units,
        untested=_untested(first, len(classes)),
    )


def _untested(predictions: Predictions, num_classes: int) -> tuple[str | None, ...]:
    """Why a class, or a finding, has no test; None for one that has."""
    if predictions.probabilities is None:
        return ()
    labels, several = predictions.labels, predictions.labels.dim() == 2
    reasons = []
    for number in range(num_classes):
        of_it = labels[:, number] if several else labels
        known = int((of_it != UNLABELLED).sum())
        there = int((of_it == (1 if several else number)).sum())
        enough = min(there, known - there) >= _FEWEST
        said = f"{there} of {counted(known, 'image')} {'with' if several else 'of'} it"
        reasons.append(None if enough else f"{said}: DeLong's test takes two with and two without")
    return tuple(reasons)


def _areas(
    first: Predictions, second: Predictions, classes: Sequence[str], level: float
) -> tuple[AreaDifference | None, tuple[AreaDifference | None, ...]]:
    """DeLong's tests: of the macro average, and of each class."""
    if first.probabilities is None or second.probabilities is None:
        return None, (None,) * len(classes)
    if first.labels.dim() == 2:
        # The areas of several findings share images: of their mean there is no such test.
        findings = range(len(classes))
        return None, tuple(_area_of_finding(first, second, f, level) for f in findings)
    labelled = first.labels != UNLABELLED
    labels = first.labels[labelled].numpy()
    ours, theirs = first.probabilities[labelled].numpy(), second.probabilities[labelled].numpy()
    counts = np.bincount(labels, minlength=len(classes))
    per_class = tuple(
        compare_areas(labels == label, ours[:, label], theirs[:, label], level=level)
        if min(count, len(labels) - count) >= _FEWEST
        else None
        for label, count in enumerate(counts.tolist())
    )
    testable = (counts > 0).sum() >= 2 and counts[counts > 0].min() >= 2
    return (
        compare_macro_areas(labels, ours, theirs, level=level) if testable else None,
        per_class,
    )


def _area_of_finding(
    first: Predictions, second: Predictions, finding: int, level: float
) -> AreaDifference | None:
    """DeLong's test of one finding, on the images that it is known of."""
    assert first.probabilities is not None and second.probabilities is not None
    known = first.labels[:, finding] != UNLABELLED
    positive = (first.labels[known, finding] == 1).numpy()
    if min(int(positive.sum()), int((~positive).sum())) < _FEWEST:
        return None
    ours, theirs = (p[known, finding].numpy() for p in (first.probabilities, second.probabilities))
    return compare_areas(positive, ours, theirs, level=level)


def _in_order_of(first: Predictions, second: Predictions) -> Predictions:
    """``second`` in the order of ``first``; the same images and labels, or an error."""
    place = {key: row for row, key in enumerate(second.keys)}
    missing = [key for key in first.keys if key not in place]
    if missing or len(place) != len(first.keys) or len(set(first.keys)) != len(first.keys):
        example = f", like {missing[0]!r}" if missing else ""
        raise ValueError(
            f"the two must be predictions of the same images: {len(missing)} of "
            f"{len(first.keys)} are missing in the second{example}, which has {len(second.keys)}"
        )
    rows = torch.tensor([place[key] for key in first.keys])
    kinds = [(p.labels.shape[1:], p.labels.is_floating_point()) for p in (first, second)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            "the two must both be of classes, of as many findings, or of numbers; compare runs on "
            "the same data"
        )
    told = is_labelled(first.labels) | is_labelled(second.labels[rows])
    differ = told & (second.labels[rows] != first.labels)
    if bool(differ.any()):
        at = int(differ.nonzero()[0, 0])
        raise ValueError(
            f"the two disagree on the label of {first.keys[at]!r}; compare runs on the same data"
        )
    probabilities = second.probabilities
    return Predictions(
        first.keys,
        first.labels,
        second.logits[rows],
        None if probabilities is None else probabilities[rows],
        second.cuts,
    )


def _row(name: str, row: AreaDifference) -> str:
    said = f"{name}: {row.first:.4f} against {row.second:.4f}, difference {row.difference:.4f}"
    if math.isnan(row.p):
        return f"{said} (no variance, no test)"
    return f"{said} [{row.low:.4f}, {row.high:.4f}], z {row.z:.3f}, p {row.p:.4g} (DeLong)"


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
