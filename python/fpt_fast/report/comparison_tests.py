"""The tests of pairs of runs, as tables of a page."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

from fpt_fast.report.comparison_figures import swatch
from fpt_fast.report.trust import TITLES, number
from fpt_fast.trust import AreaDifference, Comparison, Interval

# The differences that are shown beside DeLong's of the areas, or in its place.
_SHOWN = ("ap", "exact_match", "accuracy", "f1", "kappa", "mae", "rmse", "r2")


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """Two runs by their numbers, compared on the images that all runs have."""

    first: int
    second: int
    comparison: Comparison


def differences(names: Sequence[str], pairs: Sequence[Pair], *, several: bool) -> str:
    """The ``pairs`` of runs, called ``names``, with DeLong's test of their areas and paired
    intervals of other metrics; of ``several`` findings per image a second table with DeLong's
    tests of each finding.  Empty without pairs."""
    if not pairs:
        return ""
    comparisons = [pair.comparison for pair in pairs]
    areas = [comparison.auc for comparison in comparisons]
    tested = any(area is not None for area in areas)
    shown = [n for n in (*(() if tested else ("auc",)), *_SHOWN) if n in comparisons[0].differences]
    titles = ["AUC, first less second", "p (DeLong)", "p (Holm)"] if tested else []
    titles += [TITLES.get(name, name) for name in shown]
    rows = []
    for pair, area, p_of_all in zip(pairs, areas, holm(map(_p_of, areas)), strict=True):
        cells = "".join(_area_cells(area, p_of_all)) if tested else ""
        cells += "".join(cell(pair.comparison.differences[name]) for name in shown)
        rows.append(f'<tr><th scope="row">{_named(names, pair)}</th>{cells}</tr>')
    told = (
        "DeLong's test of the (macro) area; Holm's p allows for all tests of this table. "
        if tested
        else ""
    )
    return (
        f"<h2>Differences</h2>{_table(['pair'], titles, rows)}"
        f'<p class="soft">First less second, on {comparisons[0].images} labelled images that all '
        f"runs have. {told}In brackets: {comparisons[0].level:.0%} intervals, of "
        f"{'the other' if tested else 'all'} metrics by paired bootstrap.</p>"
        f"{_by_finding(names, pairs) if several else ''}"
    )


def holm(values: Iterable[float]) -> list[float]:
    """Holm's adjustment of p-values for having made all these tests; NaN stays and counts not.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979) 65-70.
    """
    adjusted = list(values)
    known = sorted((value, at) for at, value in enumerate(adjusted) if not math.isnan(value))
    highest = 0.0
    for rank, (value, at) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * value))
        adjusted[at] = highest
    return adjusted


def cell(value: Interval) -> str:
    """A figure with its interval below it, where it has one."""
    below = ""
    if math.isfinite(value.low):
        below = f'<small class="interval">[{value.low:.3f}, {value.high:.3f}]</small>'
    return f"<td>{number(value.estimate)}{below}</td>"


def _by_finding(names: Sequence[str], pairs: Sequence[Pair]) -> str:
    found = [
        (pair, finding, area)
        for pair in pairs
        for finding, area in zip(pair.comparison.classes, pair.comparison.per_class, strict=True)
    ]
    adjusted = holm(_p_of(area) for _, _, area in found)
    rows = []
    for (pair, finding, area), p_of_all in zip(found, adjusted, strict=True):
        both = (math.nan, math.nan) if area is None else (area.first, area.second)
        cells = [f"<td>{number(value)}</td>" for value in both]
        cells += _area_cells(area, p_of_all)
        rows.append(
            f'<tr><th scope="row">{_named(names, pair)}</th>'
            f'<td class="left">{escape(finding)}</td>{"".join(cells)}</tr>'
        )
    titles = ["AUC of the first", "of the second", "first less second", "p (DeLong)", "p (Holm)"]
    return (
        f"<h3>AUC of each finding</h3>{_table(['pair', 'finding'], titles, rows)}"
        '<p class="soft">DeLong\'s test on the images that a finding is known of; none (–) where '
        "fewer than two are with it, or without it. Holm's p allows for all tests of this table."
        "</p>"
    )


def _p_of(area: AreaDifference | None) -> float:
    return math.nan if area is None else area.p


def _named(names: Sequence[str], pair: Pair) -> str:
    return " less ".join(
        f"{swatch(position)} {escape(names[position])}" for position in (pair.first, pair.second)
    )


def _table(left: Sequence[str], right: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(f'<th scope="col" class="left">{escape(title)}</th>' for title in left)
    head += "".join(f'<th scope="col">{escape(title)}</th>' for title in right)
    return (
        f'<div class="scroll"><table class="runs"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _area_cells(area: AreaDifference | None, adjusted: float) -> Iterator[str]:
    if area is None:
        yield from ["<td>–</td>"] * 3
        return
    yield cell(Interval(area.difference, area.low, area.high))
    yield from (f"<td>{_p(value)}</td>" for value in (area.p, adjusted))


def _p(value: float) -> str:
    if math.isnan(value):
        return "–"
    return "&lt; 0.0001" if value < 1e-4 else f"{value:.4f}"
