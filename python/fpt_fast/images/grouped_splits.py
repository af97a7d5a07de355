"""Splits of images that belong together: no group (patient) ever stands on two sides.

Groups are put one by one where they are missing most, large ones first; then single groups move
for as long as that brings the splits nearer to their shares.  What is left is what the sizes of
the groups do not allow better, one move at a time.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from fpt_fast.images.splits import rank

Counts = npt.NDArray[np.float64]
Assignment = npt.NDArray[np.int64]

_LEAST_GAIN = 1e-9


def divide_groups(
    contents: Mapping[str, Sequence[float]],
    shares: Sequence[float],
    seed: int,
    *,
    complete: int | None = None,
) -> dict[str, int]:
    """Assign every group to one of ``shares`` (which sum to 1), by position.

    ``contents`` counts what a group holds: its images of each class, in one order for all.  What
    is near to its share is the number of images of each class, and of all images, weighted so
    that rare classes count as much as common ones.  The part ``complete`` gets some of every class;
    each other part with a share gets a group if that leaves one to spare.
    The result depends on names, contents and ``seed``, not on order.
    """
    names = sorted(contents)
    if not names:
        return {}
    counts = np.array([contents[name] for name in names], dtype=np.float64)  # [groups, classes]
    division = _Division(counts, np.asarray(shares, dtype=np.float64), complete)
    noise = [int.from_bytes(rank(name, seed)[:6]) / 2.0**48 for name in names]
    sizes = counts.sum(axis=1) * (0.5 + np.asarray(noise))
    for group in sorted(range(len(names)), key=lambda group: (-sizes[group], noise[group])):
        division.place(group)
    division.see_to_minimum()
    division.improve()
    return {name: int(part) for name, part in zip(names, division.part, strict=True)}


class _Division:
    """Groups in parts: ``part`` [groups], and how many images each part has over its share."""

    def __init__(self, counts: Counts, shares: Counts, complete: int | None) -> None:
        totals = counts.sum(axis=0)
        # The number of images counts like one more class.
        self.counts = np.column_stack([counts, counts.sum(axis=1)])
        whole = np.append(totals, counts.sum())
        self.weight = 1.0 / np.maximum(whole, 1.0)
        self.over = -np.outer(shares, whole)  # [parts, classes + 1]
        self.part: Assignment = np.full(len(counts), -1)
        self.groups = np.zeros(len(shares), dtype=np.int64)
        self.open = np.flatnonzero(shares > 0.0)
        self.complete = complete
        self.holders = np.zeros(counts.shape[1], dtype=np.int64)
        self.itself = (self.counts**2) @ self.weight  # [groups]

    def place(self, group: int) -> None:
        """Put a group where it is missing most."""
        cost = self.over[self.open] @ (self.weight * self.counts[group])
        self._put(group, int(self.open[int(cost.argmin())]))

    def see_to_minimum(self) -> None:
        """Give ``complete`` some of every class, then every part a group if one can be spared."""
        if self.complete is not None:
            for kind in np.flatnonzero(self.holders == 0):
                has = np.flatnonzero(self.counts[:, kind] > 0)
                # A group that came for another class may have brought this one.
                if len(has) and self.holders[kind] == 0:
                    self._move(int(has[self.itself[has].argmin()]), self.complete)
        for part in self.open[self.groups[self.open] == 0]:
            spare = np.flatnonzero(self._movable())
            if len(spare):
                self._move(int(spare[self.itself[spare].argmin()]), int(part))

    def improve(self) -> None:
        """Move single groups for as long as one brings the parts nearer to their shares."""
        while True:
            gains = self._gains()
            best = int(gains.argmax())
            group, part = divmod(best, len(self.open))
            if gains.flat[best] <= _LEAST_GAIN:
                return
            self._move(group, int(self.open[part]))

    def _gains(self) -> Counts:
        """[groups, open parts]: how much nearer to the shares each single move would bring."""
        pull = (self.counts * self.weight) @ self.over.T  # [groups, parts]
        here = pull[np.arange(len(self.part)), self.part]
        gains: Counts = 2.0 * (here[:, None] - pull[:, self.open] - self.itself[:, None])
        gains[~self._movable()] = -np.inf
        gains[self.part[:, None] == self.open[None, :]] = -np.inf
        return gains

    def _movable(self) -> npt.NDArray[np.bool_]:
        """Groups whose part can do without them."""
        movable: npt.NDArray[np.bool_] = self.groups[self.part] > 1
        if self.complete is not None:
            last = (self.holders == 1) & (self.counts[:, :-1] > 0)
            movable &= ~((self.part == self.complete) & last.any(axis=1))
        return movable

    def _put(self, group: int, part: int) -> None:
        self.part[group] = part
        self._count(group, part, 1)

    def _move(self, group: int, part: int) -> None:
        self._count(group, int(self.part[group]), -1)
        self._put(group, part)

    def _count(self, group: int, part: int, sign: int) -> None:
        self.over[part] += sign * self.counts[group]
        self.groups[part] += sign
        if part == self.complete:
            self.holders += sign * (self.counts[group, :-1] > 0)
