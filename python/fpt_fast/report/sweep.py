"""The results of a sweep: one row a model, mean and spread over seeds, and a plot."""

import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpt_fast.files import write_atomically
from fpt_fast.metrics import LOWER_IS_BETTER, spoken
from fpt_fast.report.figures import line, log_axis, render
from fpt_fast.report.pooled import PooledRow, pooled_markdown

# Metrics of the evaluated split that the summary shows, where there are such.
_SHOWN = ("auc", "accuracy", "f1", "kappa", "mae", "rmse", "r2")


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One model: what was varied, its best epoch (0-based) and value of the monitored metric on
    the validation images, its metrics on the evaluated split, and why it ended early, if so."""

    name: str
    values: dict[str, float]
    best_epoch: int | None
    best_value: float | None
    metrics: dict[str, float]
    ended: str | None

    @property
    def setting(self) -> tuple[tuple[str, float], ...]:
        """What was varied but for the seed."""
        return tuple((name, value) for name, value in self.values.items() if name != "seed")


@dataclass(frozen=True, slots=True)
class SettingSummary:
    """Models that differ in their seed alone: metric name -> (mean, standard deviation).

    The deviation is NaN for a single model.
    """

    setting: tuple[tuple[str, float], ...]
    models: int
    ended: int
    values: dict[str, tuple[float, float]]


def summarise(rows: Sequence[SweepRow], monitor: str) -> tuple[SettingSummary, ...]:
    """One summary a setting, the best mean of the monitored validation metric first.

    Models that ended early count in ``ended`` and in nothing else, lest a mean be made of the
    seeds that happened to survive and of others' halves.
    """
    settings = dict.fromkeys(row.setting for row in rows)
    summaries = [_summary(setting, rows, monitor) for setting in settings]
    sign = 1.0 if monitor in LOWER_IS_BETTER else -1.0

    def rank(summary: SettingSummary) -> float:
        mean = summary.values[_validation(monitor)][0]
        return math.inf if math.isnan(mean) else sign * mean

    return tuple(sorted(summaries, key=rank))


def write_sweep_files(
    folder: Path,
    rows: Sequence[SweepRow],
    monitor: str,
    split: str,
    pooled: Sequence[PooledRow] = (),
) -> tuple[Path, ...]:
    """Write ``sweep.csv`` (a row a model), ``summary.csv``, ``summary.md`` and ``sweep.svg``.

    ``split`` is the one that the rows' metrics are of, ``pooled`` what ``summary.md`` says of
    folds beside mean and spread.  Each file is replaced whole; returns
    their paths.
    """
    summaries = summarise(rows, monitor)
    paths = tuple(folder / name for name in ("sweep.csv", "summary.csv", "summary.md", "sweep.svg"))
    _write_rows(paths[0], rows, monitor, split)
    _write_summary(paths[1], summaries, split)
    with write_atomically(paths[2]) as file:
        file.write(sweep_markdown(summaries, split, pooled))
    with write_atomically(paths[3]) as file:
        file.write(plot(rows, monitor).decode())
    return paths


def markdown(summaries: Sequence[SettingSummary], split: str) -> str:
    """The summary as a Markdown table: mean ± standard deviation over the seeds."""
    columns = list(summaries[0].values)
    names = [name for name, _ in summaries[0].setting]
    head = [*names, "models", *(_spoken(name, split) for name in columns)]
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for summary in summaries:
        models = f"{summary.models}" + (f" ({summary.ended} ended)" if summary.ended else "")
        cells = [f"{value:g}" for _, value in summary.setting]
        cells += [models, *(_mean_and_spread(*summary.values[name]) for name in columns)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def sweep_markdown(
    summaries: Sequence[SettingSummary], split: str, pooled: Sequence[PooledRow]
) -> str:
    """``markdown`` and, of folds, the table of pooled predictions below it."""
    table = markdown(summaries, split)
    return f"{table}\n{pooled_markdown(pooled)}" if pooled else table


def plot(rows: Sequence[SweepRow], monitor: str) -> bytes:
    """Best validation value of every model over the first setting that varies, as SVG.

    One colour for each combination of the others; a line joins the means over the seeds.
    """
    axis_name = next(iter(rows[0].values), "seed")
    others = dict.fromkeys(_others(row, axis_name) for row in rows)

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for number, other in enumerate(others):
            points = [
                (row.values.get(axis_name, 0.0), row.best_value)
                for row in rows
                if _others(row, axis_name) == other and row.best_value is not None
            ]
            xs = sorted({x for x, _ in points})
            means = [statistics.fmean(y for x, y in points if x == at) for at in xs]
            label = ", ".join(f"{name} {value:g}" for name, value in other)
            if points:
                line(axis, xs, means, number, label or "mean", marker=False)
                axis.scatter(*zip(*points, strict=True), s=14, color=axis.lines[-1].get_color())
        if axis_name in ("learning_rate", "weight_decay") and all(
            row.values[axis_name] > 0 for row in rows
        ):
            log_axis(axis.xaxis)
        axis.set_xlabel(axis_name.replace("_", " "))
        axis.set_ylabel(f"best validation {spoken(monitor)}")
        if len(others) > 1:
            axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0))

    return render(draw, (6.6, 3.6))


def _summary(
    setting: tuple[tuple[str, float], ...], rows: Sequence[SweepRow], monitor: str
) -> SettingSummary:
    every = [row for row in rows if row.setting == setting]
    whole = [row for row in every if row.ended is None]
    columns = {
        _validation(monitor): [math.nan if r.best_value is None else r.best_value for r in whole]
    }
    for name in _SHOWN:
        if any(name in row.metrics for row in rows):
            columns[name] = [row.metrics.get(name, math.nan) for row in whole]
    values = {name: _moments(numbers) for name, numbers in columns.items()}
    return SettingSummary(setting, len(every), len(every) - len(whole), values)


def _moments(numbers: Sequence[float]) -> tuple[float, float]:
    finite = [number for number in numbers if math.isfinite(number)]
    mean = statistics.fmean(finite) if finite else math.nan
    return mean, statistics.stdev(finite) if len(finite) > 1 else math.nan


def _others(row: SweepRow, axis_name: str) -> tuple[tuple[str, float], ...]:
    return tuple((name, value) for name, value in row.setting if name != axis_name)


def _validation(monitor: str) -> str:
    return f"val_{monitor}"


def _title(column: str, split: str) -> str:
    return column if column.startswith("val_") else f"{split}_{column}"


def _spoken(column: str, split: str) -> str:
    """A column's title for people."""
    name = column.removeprefix("val_")
    return (
        _title(column, split)
        if spoken(name) == name
        else (f"{split if name == column else 'val'} {spoken(name)}")
    )


def _mean_and_spread(mean: float, spread: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.4f}" if math.isnan(spread) else f"{mean:.4f} ± {spread:.4f}"


def _write_rows(path: Path, rows: Sequence[SweepRow], monitor: str, split: str) -> None:
    names = list(rows[0].values)
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    with write_atomically(path) as file:
        table = csv.writer(file, lineterminator="\n")
        titles = (f"{split}_{name}" for name in metrics)
        table.writerow(["model", *names, "best_epoch", _validation(monitor), *titles, "ended"])
        for row in rows:
            numbers = [row.best_value, *(row.metrics.get(name) for name in metrics)]
            table.writerow(
                [
                    row.name,
                    *(f"{row.values[name]:g}" for name in names),
                    "" if row.best_epoch is None else row.best_epoch,
                    *("" if n is None or math.isnan(n) else n for n in numbers),
                    row.ended or "",
                ]
            )


def _write_summary(path: Path, summaries: Sequence[SettingSummary], split: str) -> None:
    columns = list(summaries[0].values)
    with write_atomically(path) as file:
        table = csv.writer(file, lineterminator="\n")
        titles = [
            f"{_title(name, split)}_{part}" for name in columns for part in ("mean", "deviation")
        ]
        table.writerow([*(name for name, _ in summaries[0].setting), "models", "ended", *titles])
        for summary in summaries:
            numbers = [number for name in columns for number in summary.values[name]]
            table.writerow(
                [
                    *(f"{value:g}" for _, value in summary.setting),
                    summary.models,
                    summary.ended,
                    *("" if math.isnan(number) else number for number in numbers),
                ]
            )
