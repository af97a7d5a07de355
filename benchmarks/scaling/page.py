"""The curves as plots, and the page in docs/ that shows them."""

import itertools
from pathlib import Path
from typing import Any

from benchmarks.scaling.curves import CURVES, Curve, Point
from fpt_fast.report.figures import line, log_axis, render


def write_page(results: dict[str, Any], docs: Path) -> None:
    """Draw every curve that was measured, and write ``docs/scaling.md``."""
    points = [Point(**point) for point in results["points"]]
    lines = [
        "# Scaling",
        "",
        f"Measured on {results['machine']}, {results['cores']} cores, torch {results['torch']}, "
        f"commit `{results['commit']}`, {results['date']}, "
        + (
            "with tiny models (`--small`): the shape of the curves says something, the times "
            "do not. "
            if results["small"]
            else "with ViT-B as published. "
        )
        + "*Plain* is the published algorithm in plain f32 PyTorch (`benchmarks/plain/`), "
        "alternating with ours. Drawn by `python -m benchmarks.scaling --plot` from "
        "`benchmarks/results/scaling.json`; `python -m benchmarks.scaling` measures anew.",
    ]
    (docs / "figures").mkdir(parents=True, exist_ok=True)
    for curve in CURVES.values():
        mine = [point for point in points if point.curve == curve.name]
        if not mine:
            continue
        (docs / "figures" / f"scaling-{curve.name}.svg").write_bytes(plot(curve, mine))
        lines += ["", f"## {curve.title}", "", _as_markdown(curve.measure.__doc__)]
        lines += ["", f"![{curve.title}](figures/scaling-{curve.name}.svg)", "", *_table(mine)]
    (docs / "scaling.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def plot(curve: Curve, points: list[Point]) -> bytes:
    """Time and bytes against size on logarithmic axes; a dotted line where one was not run: SVG."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2)
        for axis, label in zip(axes, ("seconds", curve.memory), strict=True):
            log_axis(axis.xaxis)
            log_axis(axis.yaxis)
            axis.set_xlabel(curve.axis)
            axis.set_ylabel(label)
        for number, who in enumerate(("ours", "plain")):
            mine = [point for point in points if point.who == who and point.died is None]
            x = [point.x for point in mine]
            line(axes[0], x, [point.seconds or 0.0 for point in mine], number, who)
            line(axes[1], x, [(point.bytes or 0) / 1e6 for point in mine], number, who)
        died = [(point.x, f"{point.who}: not run") for point in points if point.died]
        for axis, (number, (x, label)) in itertools.product(axes, enumerate(died)):
            # Names that begin with an underscore stay out of the legend: one is enough.
            axis.axvline(
                x,
                color="#d55e00",
                linewidth=1.2,
                linestyle=":",
                label="_more" if number else label,
            )
        sizes = sorted({point.x for point in points})
        for axis in axes:
            axis.set_xticks(sizes, [f"{size:g}" for size in sizes])
            axis.minorticks_off()
            axis.legend(loc="best")
        axes[0].set_title(curve.title)

    return render(draw, (9.2, 3.4))


def _table(points: list[Point]) -> list[str]:
    lines = ["| size | ours | plain | plain / ours | ours, MB | plain, MB |", "| --- " * 6 + "|"]
    for x in sorted({point.x for point in points}):
        found = {point.who: point for point in points if point.x == x}
        ours, plain = found["ours"], found["plain"]
        assert ours.seconds is not None and ours.bytes is not None
        mine = f"| {x:g} | {ours.seconds:.3g} s "
        if plain.seconds is None or plain.bytes is None:
            lines.append(f"{mine}| not run: {plain.died} | – | {_megabytes(ours.bytes)} | – |")
            continue
        ratio = plain.seconds / ours.seconds
        memory = f"{_megabytes(ours.bytes)} | {_megabytes(plain.bytes)} |"
        lines.append(f"{mine}| {plain.seconds:.3g} s | {ratio:.2f} | {memory}")
    return lines


def _as_markdown(docstring: str | None) -> str:
    return " ".join((docstring or "").split()).replace("``", "`")


def _megabytes(count: int) -> str:
    """Three figures, and no power of ten."""
    value = count / 1e6
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"
