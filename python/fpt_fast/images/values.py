"""A number per image: reading it, dividing images by it, and its scale."""

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence

from fpt_fast.records import ImageItem

# Images are divided into splits so that each has its share of the low, middle and high values.
_STRATA = 5


def parse_value(name: str, written: str) -> float:
    """The number of a cell; ``ValueError`` says what is wrong with it."""
    try:
        value = float(written) if "_" not in written else math.nan
    except ValueError:
        hint = " (write a point, not a comma)" if "," in written else ""
        raise ValueError(f"{name} must be a number, got {written!r}{hint}") from None
    if not math.isfinite(value):
        raise ValueError(
            f"{name} must be a finite number, got {written!r}; leave the row out if it is unknown"
        )
    return value


def strata_of(values: Sequence[float]) -> list[str]:
    """The fifth that each value is in, by rank; equal values are together."""
    ordered = sorted(values)
    return [str(_STRATA * bisect_left(ordered, value) // len(ordered)) for value in values]


def value_scale(items: Sequence[ImageItem]) -> tuple[float, float]:
    """Mean and standard deviation of the images' values.

    Raises ``ValueError`` where they have none, or are all alike: nothing could be learned.
    """
    values = [item.value for item in items if item.value is not None]
    if not values or min(values) == max(values):
        raise ValueError(
            f"the values of {len(values)} training images must differ to be learned, got "
            f"{values[0] if values else 'none'} for all"
        )
    return statistics.fmean(values), statistics.pstdev(values)
