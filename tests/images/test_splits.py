"""Counts and stability of stratified splits."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpt_fast.images.splits import assign_splits, split_counts


@given(
    total=st.integers(0, 400),
    shares=st.tuples(st.integers(1, 20), st.integers(0, 20), st.integers(0, 20)),
)
def test_counts(total: int, shares: tuple[int, int, int]) -> None:
    ratios = tuple(share / sum(shares) for share in shares)
    counts = split_counts(total, ratios)
    assert sum(counts) == total and min(counts) >= 0
    positive = [i for i in range(3) if ratios[i] > 0]
    assert all(counts[i] == 0 for i in range(3) if ratios[i] == 0)
    if total >= len(positive):
        assert all(counts[i] > 0 for i in positive)
    elif total:
        assert counts[0] > 0
    if min(total * ratios[i] for i in positive) >= 1:
        assert all(abs(counts[i] - total * ratios[i]) < 1 for i in range(3))


@pytest.mark.parametrize(
    ("total", "counts"),
    [(0, [0, 0, 0]), (1, [1, 0, 0]), (2, [2, 0, 0]), (3, [1, 1, 1]), (10, [7, 1, 2])],
)
def test_small_classes(total: int, counts: list[int]) -> None:
    assert split_counts(total, (0.7, 0.1, 0.2)) == counts


def test_order_does_not_matter_and_seed_does() -> None:
    keys = [f"a/{number}.png" for number in range(40)]
    first = assign_splits({"a": keys}, (0.7, 0.1, 0.2), seed=3)
    assert assign_splits({"a": keys[::-1]}, (0.7, 0.1, 0.2), seed=3) == first
    assert Counter(first.values()) == {"train": 28, "val": 4, "test": 8}
    others = [assign_splits({"a": keys}, (0.7, 0.1, 0.2), seed=seed) for seed in range(5)]
    assert len({tuple(sorted(split.items())) for split in others}) == 5


def test_the_split_of_a_seed_is_fixed_for_all_time() -> None:
    """A change here would mix training and test images of users' existing caches and runs."""
    keys = [f"{number}.png" for number in range(6)]
    assigned = assign_splits({"a": keys}, (0.5, 1 / 6, 1 / 3), seed=0)
    assert "".join(assigned[key][:2] for key in keys) == "trtrvatetetr"
