"""Stratified splits that depend on keys and a seed alone."""

import hashlib
from collections.abc import Mapping, Sequence

from fpt_fast.records import SPLITS, Split

Ratios = tuple[float, float, float]


def check_ratios(ratios: Sequence[float]) -> Ratios:
    """Return (train, val, test) ratios; ValueError unless they are shares with some for train."""
    if (
        len(ratios) != 3
        or not all(0.0 <= ratio <= 1.0 for ratio in ratios)
        or abs(sum(ratios) - 1.0) > 1e-6
        or ratios[0] == 0.0
    ):
        raise ValueError(
            f"ratios must be shares (train, val, test) that sum to 1, train above 0, "
            f"got {tuple(ratios)}"
        )
    return float(ratios[0]), float(ratios[1]), float(ratios[2])


def assign_splits(
    keys_by_class: Mapping[str, Sequence[str]], ratios: Ratios, seed: int
) -> dict[str, Split]:
    """Assign a split to every key, class by class.

    A class with at least as many images as there are splits with a share gets one in each; a
    smaller one has at least one in train.  Which images go where depends on ``seed`` and the
    keys, not on the order they come in.
    """
    assigned: dict[str, Split] = {}
    for keys in keys_by_class.values():
        shuffled = sorted(keys, key=lambda key: rank(key, seed))
        start = 0
        for split, count in zip(SPLITS, split_counts(len(keys), ratios), strict=True):
            assigned.update(dict.fromkeys(shuffled[start : start + count], split))
            start += count
    return assigned


def split_counts(total: int, ratios: Ratios) -> list[int]:
    """Divide ``total`` images by largest remainders, then see to the minimum of each split."""
    counts = [int(total * ratio + 1e-9) for ratio in ratios]
    # Rounded, so that equal remainders are equal: then the earlier split comes first.
    by_remainder = sorted(range(3), key=lambda i: round(counts[i] - total * ratios[i], 9))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    wanted = [i for i in range(3) if ratios[i] > 0.0]
    for i in wanted if total >= len(wanted) else [0]:
        if counts[i] == 0 and total > 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return counts


def rank(key: str, seed: int) -> bytes:
    """16 bytes that order keys at random, by ``seed`` alone."""
    return hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=16).digest()
