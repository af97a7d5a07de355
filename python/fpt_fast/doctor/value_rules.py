"""Rules over the numbers that the images of a data set are labelled with."""

import statistics
from collections.abc import Iterator, Sequence

from fpt_fast.doctor.findings import Finding
from fpt_fast.records import SPLITS, ImageItem
from fpt_fast.words import counted

# Deviations (by the median of all distances) from the median beyond which a number stands alone.
_FAR = 6.0
# A median distance of normal numbers, times this, is their standard deviation.
_TO_DEVIATION = 1.4826
_GRADES = 6
_FEW = 30


def find_in_values(items: Sequence[ImageItem], name: str) -> Iterator[Finding]:
    """Their range by split, outliers, and numbers that look like grades."""
    of_split = {
        split: [
            (item.value, item.key)
            for item in items
            if item.split == split and item.value is not None
        ]
        for split in SPLITS
    }
    few = []
    for split, found in of_split.items():
        if not found:
            yield Finding("note", f"there are no images in the {split} split")
            continue
        values = [value for value, _ in found]
        yield Finding(
            "note",
            f"{name} in {split}: {min(values):g} to {max(values):g}, mean "
            f"{statistics.fmean(values):.4g}, deviation {statistics.pstdev(values):.4g}",
        )
        if len(found) < _FEW:
            few.append(f"{counted(len(found), 'image')} in {split}")
    if few:
        yield Finding(
            "warning",
            f"fewer than {_FEW} images in a split are few to learn or judge a number by",
            "read the confidence intervals",
            tuple(few),
        )
    yield from _outliers([pair for found in of_split.values() for pair in found], name)
    yield from _outside(of_split["train"], of_split["val"] + of_split["test"], name)
    different = sorted({value for found in of_split.values() for value, _ in found})
    if 1 < len(different) <= _GRADES:
        yield Finding(
            "note",
            f"{name} has {len(different)} different values only",
            "are they grades? --label-column with --loss mean_square_error learns how to cut them",
        )


def _outliers(found: Sequence[tuple[float, str]], name: str) -> Iterator[Finding]:
    if not found:
        return
    middle = statistics.median(value for value, _ in found)
    usual = _TO_DEVIATION * statistics.median(abs(value - middle) for value, _ in found)
    # Where most numbers are one, their distances say nothing.
    far = [(v, key) for v, key in found if usual > 0 and abs(v - middle) > _FAR * usual]
    if far:
        yield Finding(
            "warning",
            f"of {counted(len(far), 'image')} the {name} is far from all others (beyond {_FAR:g} "
            f"deviations of the median {middle:g})",
            "check them: a slipped point or another unit? They weigh most in a square loss; "
            "--loss smooth_l1 gives them less",
            tuple(f"{key}: {value:g}" for value, key in sorted(far, reverse=True)),
        )


def _outside(
    train: Sequence[tuple[float, str]], others: Sequence[tuple[float, str]], name: str
) -> Iterator[Finding]:
    if not train:
        return
    low, high = min(train)[0], max(train)[0]
    outside = [(value, key) for value, key in others if not low <= value <= high]
    if outside:
        yield Finding(
            "note",
            f"of {counted(len(outside), 'image')} of val and test the {name} is outside what is "
            f"trained on "
            f"({low:g} to {high:g})",
            where=tuple(f"{key}: {value:g}" for value, key in outside),
        )
