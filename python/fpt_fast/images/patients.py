"""Splits of a list's rows: as given, or by ratio and seed; patients are never torn apart."""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from fpt_fast.images.csv_list import ImageSetError, Row
from fpt_fast.images.grouped_splits import divide_groups
from fpt_fast.images.splits import Ratios, assign_splits
from fpt_fast.records import SPLITS, Split

log = logging.getLogger("fpt_fast")

_LISTED = 10


def with_patients(rows: Sequence[Row], pattern: str) -> list[Row]:
    """``rows`` with the patient that the one group of ``pattern`` finds in each key."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ImageSetError(
            f"patient_pattern {pattern!r} is no regular expression: {error}"
        ) from None
    if compiled.groups != 1:
        raise ImageSetError(
            f"patient_pattern must have one group, like '([^/_]+)_[^/]*$', got {pattern!r}"
        )
    found = {row.key: compiled.search(row.key) for row in rows}
    missing = [key for key, match in found.items() if match is None or not match[1]]
    if missing:
        raise ImageSetError(
            f"patient_pattern {pattern!r} finds no patient in {len(missing)} of {len(rows)} paths: "
            f"{_shortened(missing)}"
        )
    return [row._replace(patient=match[1]) for row in rows if (match := found[row.key])]


def require_whole_patients(rows: Sequence[Row], splits: Mapping[str, Split]) -> None:
    """Raise ``ImageSetError`` naming the patients with images in more than one split."""
    sides: dict[str, set[Split]] = defaultdict(set)
    for row in rows:
        if row.patient is not None:
            sides[row.patient].add(splits[row.key])
    torn = [
        f"{patient} ({', '.join(split for split in SPLITS if split in found)})"
        for patient, found in sides.items()
        if len(found) > 1
    ]
    if torn:
        raise ImageSetError(
            f"{len(torn)} of {len(sides)} patients have images in more than one split: "
            f"{_shortened(torn)}; mend the splits, or leave them out to have them made by patient"
        )


def complete_splits(rows: Sequence[Row], ratios: Ratios, seed: int) -> dict[str, Split]:
    """Splits by key: as given, and by ratio and seed where none or no val was given."""
    given: dict[str, Split] = {row.key: row.split for row in rows if row.split is not None}
    if not given:
        log.info("no splits given: divided by ratios %s, seed %d", ratios, seed)
        return divide_rows(rows, ratios, seed)
    if "train" not in given.values():
        raise ImageSetError("no image is in the train split")
    if "test" not in given.values():
        log.warning("the data set has no test split; it stays empty")
    train, val, _ = ratios
    if "val" not in given.values() and val > 0.0:
        share = val / (train + val)
        log.warning("the data set has no val split; %.0f %% of train become val", 100 * share)
        in_train = [row for row in rows if row.split == "train"]
        given.update(divide_rows(in_train, (1.0 - share, share, 0.0), seed))
    return given


def divide_rows(rows: Sequence[Row], ratios: Ratios, seed: int) -> dict[str, Split]:
    """Splits by ratio and seed: of images class by class, or of whole patients."""
    if all(row.patient is None and not row.findings for row in rows):
        keys: dict[str, list[str]] = defaultdict(list)
        for row in rows:
            keys[row.label].append(row.key)
        return assign_splits(keys, ratios, seed)
    parts = divide_groups(group_contents(rows), ratios, seed, complete=0)
    return {row.key: SPLITS[parts[group_of(row)]] for row in rows}


def parse_fold(text: str) -> tuple[int, int]:
    """Read ``2/5`` as the second of five folds."""
    number, _, count = text.partition("/")
    if number.isdigit() and count.isdigit() and 1 <= int(number) <= int(count) >= 2:
        return int(number), int(count)
    raise ImageSetError(f"fold must be like 2/5, the second of five, got {text!r}")


def fold_splits(
    rows: Sequence[Row], fold: tuple[int, int], ratios: Ratios, seed: int
) -> dict[str, Split]:
    """Test on one of several equal parts of the images or patients; val is taken from the rest.

    The folds of one ``seed`` share no image, and together have all.
    """
    number, count = fold
    groups = group_contents(rows)
    if len(groups) < count:
        raise ImageSetError(
            f"{count} folds need at least as many images or patients, got {len(groups)}"
        )
    parts = divide_groups(groups, (1.0 / count,) * count, seed)
    rest = [row for row in rows if parts[group_of(row)] != number - 1]
    share = ratios[1] / (ratios[0] + ratios[1])
    inner = divide_groups(group_contents(rest), (1.0 - share, share), seed, complete=0)
    splits: dict[str, Split] = {row.key: "test" for row in rows}
    splits.update({row.key: SPLITS[inner[group_of(row)]] for row in rest})
    return splits


def group_of(row: Row) -> str:
    """What stays together with ``row``: its patient, or itself alone."""
    return row.key if row.patient is None else row.patient


def group_contents(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Images of each class (with each finding), by group."""
    if rows and rows[0].findings:
        found: dict[str, list[float]] = {}
        for row in rows:
            # A finding can be told or not; images without any count in the number of all.
            here = found.setdefault(group_of(row), [0.0] * (len(row.findings) + 1))
            for place, has in enumerate(row.findings):
                here[place] += has == 1
            here[-1] += not any(has == 1 for has in row.findings)
        return found
    kinds = {label: place for place, label in enumerate(sorted({row.label for row in rows}))}
    contents: dict[str, list[float]] = {}
    for row in rows:
        counts = contents.setdefault(group_of(row), [0.0] * len(kinds))
        counts[kinds[row.label]] += 1.0
    return contents


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
