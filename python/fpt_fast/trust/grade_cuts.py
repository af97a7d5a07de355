"""Cut points between grades that a regression predicts, chosen on validation images.

A regression of grades 0..G-1 is pulled towards the middle, so that the halves between them are
seldom where a grade should begin.  Only the order of the predictions matters: a cut is a place
among the sorted ones, and the best places are found exactly, not by a search that may get stuck.

For the accuracy, what a set of cuts is worth is a sum over images, and so over cuts: dynamic
programming.  Quadratic kappa is ``1 - n N / D``, where both ``N``, the squared distances between
labels and grades, and ``D``, those expected by chance, are such sums too (the labels are given, so
that chance depends on an image's own grade alone).  A ratio of sums is minimised by minimising
``N - (N0 / D0) D`` for the best ratio so far until it is 0 (Dinkelbach, Management Science 13
(1967) 492-498): a few rounds, in whole numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from fpt_fast.metrics import compute_metrics, finite_or_none, halves
from fpt_fast.records import UNLABELLED, GradeCuts, Predictions

# Of the metrics, those that depend on the cuts.
_OF_GRADES = ("accuracy", "f1", "precision", "recall", "kappa")


@dataclass(frozen=True, slots=True)
class Grading:
    """The ``cuts`` that a split was graded by, and its metrics ``at_halves`` instead."""

    cuts: tuple[float, ...]
    at_halves: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            "cuts": list(self.cuts),
            "at_halves": {name: finite_or_none(value) for name, value in self.at_halves.items()},
        }


def grading_of(predictions: Predictions, num_classes: int) -> Grading | None:
    """What learned cuts change; None where ``predictions`` have none."""
    if predictions.cuts is None:
        return None
    plain = Predictions(predictions.keys, predictions.labels, predictions.logits, None)
    metrics = compute_metrics(plain, num_classes)
    return Grading(predictions.cuts, {name: metrics[name] for name in _OF_GRADES})


def fit_grade_cuts(
    predictions: Predictions, num_classes: int, aim: GradeCuts = "kappa"
) -> tuple[float, ...]:
    """The ascending cuts for which ``aim``, quadratic kappa or accuracy, is highest: no other cuts
    reach more on these images.  An image has as many grades below it as cuts that it reaches.

    Of equally good places those next to the halves are taken.  In its place a cut stands at its
    half if that lies there, else in the middle between two predictions.  With ``aim="halves"``, or
    where all labels are one grade, the halves.  Raises ``ValueError`` for predictions that are not
    of grades, or without labelled images.
    """
    if aim not in get_args(GradeCuts):
        raise ValueError(f"aim must be one of {', '.join(get_args(GradeCuts))}, got {aim!r}")
    if predictions.probabilities is not None or predictions.labels.dim() != 1:
        raise ValueError("cuts are between grades that a regression predicts, got probabilities")
    compute_metrics(predictions, num_classes)  # raises for everything that cannot be measured
    labelled = predictions.labels != UNLABELLED
    labels = predictions.labels[labelled].numpy()
    if aim == "halves" or len(np.unique(labels)) < 2:
        return halves(num_classes)
    scores = predictions.logits[labelled, 0].double().numpy()
    places, counts = _groups(scores, labels, num_classes)
    search = _Search(places.tolist(), halves(num_classes))
    if aim == "accuracy":
        return search.cuts(search.best([[-count for count in row] for row in counts]))
    return search.cuts(_best_for_kappa(search, counts))


def _groups(
    scores: NDArray[np.float64], labels: NDArray[np.int64], grades: int
) -> tuple[NDArray[np.float64], list[list[int]]]:
    """The different scores, ascending, and how many images of each grade have each."""
    places, group = np.unique(scores, return_inverse=True)
    counts = np.zeros((len(places), grades), dtype=np.int64)
    np.add.at(counts, (group, labels), 1)
    return places, counts.tolist()


def _best_for_kappa(search: "_Search", counts: list[list[int]]) -> list[int]:
    grades = range(len(counts[0]))
    labels = [sum(row[grade] for row in counts) for grade in grades]
    chance = [sum(n * (grade - own) ** 2 for own, n in enumerate(labels)) for grade in grades]
    apart = [
        [sum(n * (grade - own) ** 2 for own, n in enumerate(row)) for grade in grades]
        for row in counts
    ]
    by_chance = [[sum(row) * chance[grade] for grade in grades] for row in counts]
    best = search.at_halves()
    while True:
        found, expected = search.total(apart, best), search.total(by_chance, best)
        costs = [
            [expected * near - found * far for near, far in zip(*rows, strict=True)]
            for rows in zip(apart, by_chance, strict=True)
        ]
        better = search.best(costs)
        if search.total(costs, better) == 0:
            # None is better than ``best``; of those as good, this one is next to the halves.
            return better
        best = better


class _Search:
    """Places for cuts among ascending ``scores``: a cut at place p has p scores below it."""

    def __init__(self, scores: Sequence[float], around: Sequence[float]) -> None:
        self._scores = [-math.inf, *scores, math.inf]
        self._around = around

    def best(self, costs: Sequence[Sequence[int]]) -> list[int]:
        """The places, ascending, that make the sum of ``costs`` [scores][grades] least; of equals
        those whose cuts are nearest to the halves."""
        places = range(len(costs) + 1)
        reached: list[tuple[int, float]] = [(0, 0.0)] * len(places)
        chosen: list[list[int]] = []
        for number, half in enumerate(self._around):
            # What it costs that the scores below this cut have the grade below it, not above.
            below = _running([row[number] - row[number + 1] for row in costs])
            least, at, following = reached[0], 0, []
            came_from = []
            for place in places:
                if reached[place] < least:
                    least, at = reached[place], place
                cost = least[0] + below[place], least[1] + abs(self._cut(place, half) - half)
                following.append(cost)
                came_from.append(at)
            reached = following
            chosen.append(came_from)
        at = min(places, key=reached.__getitem__)
        found = []
        for came_from in reversed(chosen):
            found.append(at)
            at = came_from[at]
        return found[::-1]

    def total(self, costs: Sequence[Sequence[int]], places: Sequence[int]) -> int:
        """The sum of ``costs`` with cuts at ``places``."""
        ends = [0, *places, len(costs)]
        return sum(
            sum(row[grade] for row in costs[ends[grade] : ends[grade + 1]])
            for grade in range(len(ends) - 1)
        )

    def at_halves(self) -> list[int]:
        """Places of the halves."""
        inside = self._scores[1:-1]
        return [sum(score < half for score in inside) for half in self._around]

    def cuts(self, places: Sequence[int]) -> tuple[float, ...]:
        """The cuts at ``places``, ascending."""
        cuts = [self._cut(place, half) for place, half in zip(places, self._around, strict=True)]
        # Two in one place may stand the wrong way round.
        return tuple(np.maximum.accumulate(cuts).tolist())

    def _cut(self, place: int, half: float) -> float:
        low, high = self._scores[place], self._scores[place + 1]
        if low < half <= high:
            return half
        if math.isinf(low):
            return high
        return math.nextafter(low, math.inf) if math.isinf(high) else (low + high) / 2


def _running(values: Sequence[int]) -> list[int]:
    """Sums of the first 0, 1, ... values."""
    sums = [0]
    for value in values:
        sums.append(sums[-1] + value)
    return sums
