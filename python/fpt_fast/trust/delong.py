"""DeLong's test: do two models that saw the same images have different areas under the curve?

Source: DeLong, DeLong, Clarke-Pearson, Biometrics 44 (1988) 837-845; the structural components
by midranks after Sun and Xu, IEEE Signal Processing Letters 21 (2014) 1389-1393.
"""

import math
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fpt_fast.metrics import finite_or_none
from fpt_fast.trust.resampled import Floats


@dataclass(frozen=True, slots=True)
class AreaDifference:
    """Two areas on the same images, and the test of their ``difference`` (first less second).

    ``error``, the standard error of the difference, ``low`` and ``high``, its interval at
    ``level``, ``z`` and the two-sided ``p`` are NaN where the areas have no variance.
    """

    first: float
    second: float
    difference: float
    error: float
    low: float
    high: float
    z: float
    p: float
    level: float

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; None for NaN."""
        return {name: finite_or_none(value) for name, value in asdict(self).items()}


def compare_areas(
    labels: NDArray[np.bool_] | NDArray[np.int64],
    first: NDArray[Any],
    second: NDArray[Any],
    *,
    level: float = 0.95,
) -> AreaDifference:
    """Compare the areas of two scores [images] for the images that are positive by ``labels``.

    Raises ``ValueError`` for shapes that differ, or without two images of either kind.
    """
    positive = np.asarray(labels, dtype=bool)
    for name, scores in (("first", first), ("second", second)):
        if positive.ndim != 1 or np.shape(scores) != positive.shape:
            raise ValueError(
                f"{name} must be scores of {positive.shape} images, got {np.shape(scores)}"
            )
    if min(int(positive.sum()), int((~positive).sum())) < 2:
        raise ValueError(
            "DeLong's test needs two positive and two negative images, got "
            f"{int(positive.sum())} and {int((~positive).sum())}"
        )
    ones = positive.astype(np.int64)
    parts = [_components(positive, np.asarray(scores)) for scores in (first, second)]
    return _test(ones, [area for area, _ in parts], [part for _, part in parts], level)


def compare_macro_areas(
    labels: NDArray[np.int64], first: NDArray[Any], second: NDArray[Any], *, level: float = 0.95
) -> AreaDifference:
    """Compare the macro averages of one-vs-rest areas of two [images, classes] probabilities.

    DeLong's structural components of every class, averaged, with the variance summed over the
    images of each class, which are independent samples; of two classes it is ``compare_areas``
    on the second one.  Classes without an image are left out, as by ``compute_metrics``.
    Raises ``ValueError`` unless every class with images has two, and there are two such classes.
    """
    known, counts = np.unique(labels, return_counts=True)
    if len(known) < 2 or counts.min() < 2:
        found = dict(zip(known.tolist(), counts.tolist(), strict=True))
        raise ValueError(
            "comparing AUC needs two classes or more with two images each, got images by class "
            f"{found}"
        )
    if first.shape != second.shape or len(first) != len(labels):
        raise ValueError(
            f"probabilities must be of the same {len(labels)} images and classes, got "
            f"{first.shape} and {second.shape}"
        )
    if first.shape[1] == 2:
        return compare_areas(labels == 1, first[:, 1], second[:, 1], level=level)
    areas: list[float] = []
    influences: list[Floats] = []
    for scores in (first, second):
        parts = [_components(labels == label, scores[:, label]) for label in known]
        areas.append(float(np.mean([area for area, _ in parts])))
        influences.append(np.mean([part for _, part in parts], axis=0))
    return _test(labels, areas, influences, level)


def _components(positive: NDArray[np.bool_], scores: NDArray[Any]) -> tuple[float, Floats]:
    """Area, and what each image adds to it: [images], with the sum twice the area.

    A positive image's component is the share of negatives that it beats, over the positives; a
    negative one's the share of positives that beat it, over the negatives.
    """
    above, below = scores[positive], scores[~positive]
    beats = (_midranks(scores)[positive] - _midranks(above)) / len(below)
    beaten = 1.0 - (_midranks(scores)[~positive] - _midranks(below)) / len(above)
    parts = np.empty(len(scores))
    parts[positive] = beats / len(above)
    parts[~positive] = beaten / len(below)
    return float(beats.mean()), parts


def _test(
    strata: NDArray[np.int64], areas: list[float], parts: list[Floats], level: float
) -> AreaDifference:
    """The test on components whose strata are independent samples."""
    first, second = areas
    difference = first - second
    change = parts[0] - parts[1]
    variance = 0.0
    for label in np.unique(strata):
        members = change[strata == label]
        variance += len(members) * float(members.var(ddof=1))
    error = math.sqrt(variance)
    # Equal scores differ by rounding at most: no variance, no test.
    if error <= 1e-12:
        nan = math.nan
        return AreaDifference(first, second, difference, nan, nan, nan, nan, nan, level)
    z = difference / error
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    p = math.erfc(abs(z) / math.sqrt(2))
    low, high = difference - reach, difference + reach
    return AreaDifference(first, second, difference, error, low, high, z, p, level)


def _midranks(values: NDArray[Any]) -> Floats:
    """Rank of each value from 1, ties share their mean."""
    ordered = np.sort(values)
    first = np.searchsorted(ordered, values, side="left")
    last = np.searchsorted(ordered, values, side="right")
    ranks: Floats = (first + last + 1) / 2
    return ranks
