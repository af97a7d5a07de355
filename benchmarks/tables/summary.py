"""A table's rows: mean over the seeds with intervals, efficiencies, and the published figures."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.results import megabytes
from benchmarks.tables.memory import Memory
from benchmarks.tables.runs import Run
from benchmarks.tables.variants import Variant
from fpt_fast.accounting import memory_efficiency, parameter_efficiency
from fpt_fast.metrics import compute_metrics
from fpt_fast.report.figures import dot, log_axis, render
from fpt_fast.trust import resampled_metrics

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Row:
    """AUC of each seed, the interval of their mean, and the memory of one training step;
    ``published_auc`` in percent."""

    variant: Variant
    aucs: tuple[float, ...]
    low: float
    high: float
    memory: Memory
    test_images: int
    rate: float | None = None
    published_auc: float | None = None

    @property
    def auc(self) -> float:
        """Mean over the seeds."""
        return sum(self.aucs) / len(self.aucs)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds; NaN for one."""
        return stdev(self.aucs) if len(self.aucs) > 1 else math.nan


def row_of(runs: Sequence[Run], memory: Memory) -> Row:
    """Summarise the seeds of one row."""
    classes = len(runs[0].classes)
    aucs = tuple(float(compute_metrics(r.predictions, classes).values["auc"]) for r in runs)
    low, high = mean_interval(runs)
    tested = len(runs[0].predictions.keys)
    return Row(runs[0].variant, aucs, low, high, memory, tested, runs[0].rate)


def mean_interval(runs: Sequence[Run], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean AUC over the runs: the same test images are drawn
    for all of them, each class with its number of images.  What it says is how far other test
    images would move the mean; other seeds are the spread.
    """
    labels = runs[0].predictions.labels.numpy()
    if any(run.predictions.keys != runs[0].predictions.keys for run in runs):
        raise ValueError("the seeds of one row must be tested on the same images; they are not")
    counts = draw(labels, RESAMPLES, np.random.default_rng(seed))
    classes = len(runs[0].classes)
    areas = [resampled_metrics(r.predictions, classes, counts).values["auc"] for r in runs]
    low, high = np.nanquantile(np.mean(areas, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def draw(labels: NDArray[np.int64], resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each image is drawn in each resample [R, images], stratified by class."""
    counts = np.zeros((resamples, len(labels)), np.int64)
    for label in np.unique(labels):
        where = np.flatnonzero(labels == label)
        even = np.full(len(where), 1 / len(where))
        counts[:, where] = rng.multinomial(len(where), even, size=resamples)
    return counts


def markdown(title: str, rows: Sequence[Row], about: Sequence[str]) -> str:
    """The table, with what it was made from above it and what it means below it."""
    full = _full(rows)
    is_published = any(row.published_auc is not None for row in rows)
    head = ["", "params", "saved for backward", "peak memory", "AUC", "95 %", "seeds", "PPE", "PME"]
    head += ["published AUC"] if is_published else []
    lines = [f"# {title}", "", *about, "", f"| {' | '.join(head)} |"]
    lines.append(f"| {' | '.join(['---'] * len(head))} |")
    for row in rows:
        memory, score = row.memory, 100 * row.auc
        step = memory.step
        pme = "–" if full is None else f"{memory_efficiency(score, memory.peak, full):.2f}"
        cells = [
            row.variant.label,
            f"{memory.share:.2f} %",
            megabytes(step.saved_bytes),
            megabytes(memory.peak),
            f"{score:.2f}",
            f"{100 * row.low:.2f}–{100 * row.high:.2f}",
            "–" if math.isnan(row.spread) else f"± {100 * row.spread:.2f}",
            f"{parameter_efficiency(score, step.trainable, step.total):.2f}",
            pme,
        ]
        if is_published:
            cells.append("–" if row.published_auc is None else f"{row.published_auc:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"AUC in percent, mean over {len(rows[0].aucs)} seeds on {rows[0].test_images} test "
        f"images; *95 %*: bootstrap over the test images ({RESAMPLES} resamples, stratified); "
        "*seeds*: standard deviation over the seeds. *Saved for backward*: what autograd keeps of "
        "one batch. *Peak memory*: the most that is alive in a training step, or in the frozen "
        "pass before it, if any (`fpt_fast.accounting`, `benchmarks/tables/memory.py`). "
        + ("PME needs the row of full fine-tuning." if full is None else ""),
    ]
    if rates_of(rows):
        said = ", ".join(f"{row.variant.label} {row.rate:g}" for row in rows if row.rate)
        lines += ["", f"Learning rates, chosen on validation images: {said}."]
    return "\n".join(lines).rstrip() + "\n"


def rates_of(rows: Sequence[Row]) -> dict[str, float]:
    """Learning rates that were searched for, by the rows' names."""
    return {row.variant.name: row.rate for row in rows if row.rate is not None}


def _full(rows: Sequence[Row]) -> int | None:
    """Peak bytes of full fine-tuning, which PME is a share of."""
    return next((row.memory.peak for row in rows if row.variant.name == "full"), None)


def write(
    folder: Path, name: str, title: str, rows: Sequence[Row], about: Sequence[str]
) -> tuple[Path, ...]:
    """Write ``NAME.md``, ``NAME.csv`` (one row a seed), ``NAME.json`` and ``NAME.svg``, and beside
    them ``rates.json`` where learning rates were searched for."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{name}.{ending}" for ending in ("md", "csv", "json", "svg"))
    paths[0].write_text(markdown(title, rows, about), encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["row", "seed", "auc", "params_percent", "saved_bytes", "peak_bytes"])
        for row in rows:
            memory = row.memory
            tail = [round(memory.share, 4), memory.step.saved_bytes, memory.peak]
            out.writerows([row.variant.name, seed, auc, *tail] for seed, auc in enumerate(row.aucs))
    values = [_json(row) for row in rows]
    paths[2].write_text(json.dumps(values, indent=1) + "\n")
    paths[3].write_bytes(plot(title, values))
    if rates := rates_of(rows):
        (folder / "rates.json").write_text(json.dumps(rates, indent=1) + "\n")
    return paths


def _json(row: Row) -> dict[str, Any]:
    return {
        "row": row.variant.name,
        "label": row.variant.label,
        "aucs": row.aucs,
        "interval": [row.low, row.high],
        "test_images": row.test_images,
        "learning_rate": row.rate,
        "published_auc": row.published_auc,
        "memory": {
            **row.memory.step.to_json(),
            "share": row.memory.share,
            "frozen_bytes": row.memory.frozen_bytes,
            "frozen_peak": row.memory.frozen_peak,
            "peak": row.memory.peak,
        },
    }


def plot(title: str, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """AUC against memory, the dot's area by trained parameters, as the papers' figure 2, of the
    rows of ``NAME.json``: SVG."""

    def draw_dots(figure: Any) -> None:
        axis = figure.subplots()
        axis.set_title(title)
        for number, row in enumerate(rows):
            memory, low_high = row["memory"], row["interval"]
            x, y = memory["peak"] / 1e6, 100 * sum(row["aucs"]) / len(row["aucs"])
            axis.vlines(x, *(100 * end for end in low_high), color="#9ca3af", linewidth=1)
            dot(axis, x, y, number, row["label"], 60 + 10 * memory["share"] ** 0.75)
        log_axis(axis.xaxis)
        axis.margins(x=0.08)
        axis.set_xlabel("memory of training, MB")
        axis.set_ylabel("AUC, %")
        legend = figure.legend(
            loc="outside right center", title="area: trained parameters", alignment="left"
        )
        for handle in legend.legend_handles:
            handle.set_sizes([60])

    return render(draw_dots, (7.6, 4.0))
