"""Every row of every machine as Markdown, and the bars of plain over ours."""

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.report.results import Results, Row, figure, megabytes, seconds

_HEAD = (
    "what | dtype | ours | plain | plain / ours | GB/s | GFLOP/s | share of floor | memory | "
    "plain's memory"
)


def markdown(results: list[Results]) -> str:
    """The page: machines side by side where there are several, then each in full."""
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m benchmarks.report` from `benchmarks/results/`; `make bench` makes "
        "such a file. Times are medians; *plain* is the published algorithm in plain f32 PyTorch "
        "(`benchmarks/plain/`) or the expression that an op replaces, in alternation with ours. "
        "*Share of floor*: the least time that the counted bytes, operations and exponentials take "
        "at the machine's own measured speeds, over our time. *Memory*: what PyTorch allocates "
        "at the peak of one run; for whole frozen passes, what a process of its own grows by.",
        "",
        "![plain over ours](figures/benchmarks.svg)",
    ]
    if len(results) > 1:
        lines += ["", "## Machines side by side", "", *_side_by_side(results)]
    for one in results:
        lines += ["", f"## {one.machine}", "", f"{one.head}.", *_machine(one)]
    return "\n".join(lines) + "\n"


def _side_by_side(results: list[Results]) -> Iterator[str]:
    """Our time on each machine, and plain over ours; rows that more than one has."""
    by_name = [{row.fullname: row for row in one.rows} for one in results]
    names = dict.fromkeys(name for rows in by_name for name in rows)
    shared = [name for name in names if sum(name in rows for rows in by_name) > 1]
    yield f"| what | {' | '.join(one.machine for one in results)} |"
    yield f"| {' | '.join(['---'] * (len(results) + 1))} |"
    for name in shared:
        cells = [
            f"{seconds(rows[name].seconds)} ({figure(rows[name].ratio)}×)" if name in rows else "–"
            for rows in by_name
        ]
        label = next(rows[name].label for rows in by_name if name in rows)
        yield f"| {label} | {' | '.join(cells)} |"


def _machine(one: Results) -> Iterator[str]:
    for failed in one.failed:
        yield from ("", f"FAILED: {failed}")
    for group in dict.fromkeys(row.group for row in one.rows):
        yield from ("", f"{group}:", "", f"| {_HEAD} |")
        yield f"| {' | '.join(['---'] * (_HEAD.count('|') + 1))} |"
        for row in one.rows:
            if row.group == group:
                yield f"| {' | '.join(_row(row))} |"


def _row(row: Row) -> list[str]:
    info = row.info
    share = info.get("share_of_floor")
    return [
        row.label,
        str(info.get("dtype", "–")).removeprefix("torch."),
        seconds(row.seconds),
        seconds(info.get("plain_seconds")) if info.get("plain_seconds") else _why(info),
        figure(row.ratio),
        figure(info.get("GB/s")),
        figure(info.get("GFLOP/s")),
        "–" if share is None else f"{100 * share:.0f} %",
        megabytes(info.get("peak_added", info.get("added"))),
        megabytes(info.get("plain_peak_added")),
    ]


def _why(info: Mapping[str, Any]) -> str:
    """Why there is no plain twin."""
    return str(info.get("absent", {}).get("plain_seconds", "–"))


def ratio_bars(results: list[Results]) -> bytes:
    """SVG: plain over ours, the median row of each group, a bar for each machine."""
    from fpt_fast.report.figures import render

    groups: dict[str, list[float | None]] = {}
    for position, one in enumerate(results):
        for group in dict.fromkeys(row.group for row in one.rows):
            ratios = sorted(r.ratio for r in one.rows if r.group == group and r.ratio is not None)
            if ratios:
                groups.setdefault(group, [None] * len(results))[position] = ratios[len(ratios) // 2]
    names = list(groups)
    height = 0.8 / max(len(results), 1)

    def draw(drawing: Any) -> None:
        axis = drawing.subplots()
        for position, one in enumerate(results):
            places = [i + position * height for i, g in enumerate(names) if groups[g][position]]
            widths = [groups[g][position] for g in names if groups[g][position]]
            bars = axis.barh(places, widths, height=height, label=one.machine)
            axis.bar_label(bars, fmt="%.1f", padding=3)
        axis.axvline(1, color="#6b7280", linewidth=1, linestyle=":")
        axis.margins(x=0.1)
        axis.grid(False, axis="y")
        axis.set_yticks([i + 0.4 - height / 2 for i in range(len(names))], names)
        axis.invert_yaxis()
        axis.set_xlabel("plain / ours, median row of the group")
        if len(results) > 1:
            axis.legend(loc="best")

    return render(draw, (7.5, 1.2 + 0.32 * len(names)))
