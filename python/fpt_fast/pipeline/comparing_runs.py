"""A page on several runs: models of a sweep, folds, or runs of their own."""

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fpt_fast.config import ConfigError
from fpt_fast.images import DecodedStore, ImageError
from fpt_fast.metrics import spoken
from fpt_fast.pipeline.compared_data import known_patients, recorded_config, recorded_items
from fpt_fast.pipeline.examples import draw_pictures
from fpt_fast.pipeline.grades import cuts_of_metrics
from fpt_fast.records import ImageItem, Predictions, Split
from fpt_fast.report import read_predictions
from fpt_fast.report.comparison import ComparedRun, restrict, write_comparison
from fpt_fast.report.comparison_figures import MOST_RUNS
from fpt_fast.report.comparison_tests import Pair
from fpt_fast.report.disagreement import common_keys, most_disputed
from fpt_fast.trust import compare_predictions

# Beyond it, each run is tested against the first one only.
ALL_PAIRS = 6


@dataclass(frozen=True, slots=True, eq=False)
class RunsComparison:
    """What a page was made of: its path, the runs by name, the tests of pairs of them, and what
    must be said beside."""

    page: Path
    runs: tuple[ComparedRun, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The runs' metrics, a line each; DeLong's tests of the pairs; the notes and the page."""
        width = max(len(run.name) for run in self.runs)
        lines = []
        for run in self.runs:
            shown = [n for n in ("auc", "accuracy", "kappa", "mae", "r2") if n in run.metrics]
            said = ", ".join(f"{spoken(name)} {run.interval(name)}" for name in shown)
            lines.append(f"{run.name:{width}}  {said}")
        for pair in self.pairs:
            tests = pair.comparison.area_lines()
            first, second = (self.runs[number].name for number in (pair.first, pair.second))
            lines += [f"{first} less {second}", *(f"  {test}" for test in tests)] if tests else []
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"page: {self.page}"])


def compare_runs(
    runs: Sequence[str | Path],
    *,
    output: str | Path,
    split: Split | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    pictures: int = 60,
) -> RunsComparison:
    """Write ``output``, a self-contained HTML page of several ``runs`` side by side.

    A run is the folder of ``train``; a sweep's folder stands for all of its models, that of a
    cross-validation for its pooled predictions.  With ``split``, what ``evaluate`` wrote for it
    is compared.  Up to six runs are tested in all pairs, more of them each against the first; on
    the images that all have.  ``pictures`` is the most images shown as such, where the data is
    still there.  Raises ``ConfigError`` where a run lacks a file, or classes or labels differ.
    """
    suffix = "" if split is None else f"-{split}"
    folders = [found for run in runs for found in _members(Path(run), suffix)]
    if not 2 <= len(folders) <= MOST_RUNS:
        raise ConfigError(
            f"a comparison is of 2 to {MOST_RUNS} runs, got {len(folders)}; name the runs, or "
            "sweeps, to compare"
        )
    names = _names(folders)
    if len(set(folders)) < len(folders):
        raise ConfigError("the same run is named twice; name different runs")
    read = [_read(folder, name, suffix) for folder, name in zip(folders, names, strict=True)]
    classes = _same_classes(read)
    items = recorded_items(folders)
    common = common_keys([run.predictions for run in read])
    restricted = [restrict(run.predictions, common) for run in read]
    pairs, notes = _pairs(read, restricted, classes, items, level, resamples)
    disputed = most_disputed(restricted, classes, pictures)
    shown = [items[key] for key in disputed if key in items]
    if len(shown) < len(disputed):
        notes.append("There are no pictures of some images: the data is not where the runs say.")
    try:
        thumbnails = draw_pictures(shown, DecodedStore())
    except ImageError as error:
        thumbnails = {}
        notes.append(f"There are no pictures: {error}.")
    page = write_comparison(
        Path(output),
        runs=read,
        classes=classes,
        split=split or "test",
        pairs=pairs,
        notes=notes,
        thumbnails=thumbnails,
    )
    return RunsComparison(page, tuple(read), tuple(pairs), tuple(notes))


def _members(run: Path, suffix: str) -> list[Path]:
    """The run itself, or the runs that its folder holds."""
    wanted = (f"predictions{suffix}.csv", f"metrics{suffix}.json")
    if all((run / name).is_file() for name in wanted):
        return [run]
    held = [path.parent for path in sorted(run.glob(f"**/{wanted[0]}"))]
    held = [folder for folder in held if (folder / wanted[1]).is_file()]
    pooled = [folder for folder in held if folder.parent.name.endswith("-pooled")]
    if pooled or held:
        return pooled or held
    if not run.is_dir():
        raise ConfigError(f"{run}: there is no such folder; name the folder of a run")
    how = "train it" if not suffix else f"fpt-fast evaluate --run {run} --split {suffix[1:]}"
    raise ConfigError(f"{run} has no {wanted[0]}; make it first: {how}")


def _names(folders: Sequence[Path]) -> list[str]:
    """The paths below what they have in common."""
    whole = [folder.resolve() for folder in folders]
    shared = Path(os.path.commonpath([folder.parent for folder in whole]))
    return [folder.relative_to(shared).as_posix() for folder in whole]


def _read(folder: Path, name: str, suffix: str) -> ComparedRun:
    metrics = json.loads((folder / f"metrics{suffix}.json").read_text(encoding="utf-8"))
    table = folder / f"predictions{suffix}.csv"
    predictions, _ = read_predictions(table, metrics["classes"], cuts_of_metrics(metrics))
    return ComparedRun(
        name, predictions, metrics, _history(folder / "history.csv"), recorded_config(folder)
    )


def _history(path: Path) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return {
        name: [math.nan if row[at] == "" else float(row[at]) for row in rows]
        for at, name in enumerate(header)
    }


def _same_classes(runs: Sequence[ComparedRun]) -> tuple[str, ...]:
    first = runs[0]
    for run in runs[1:]:
        if run.metrics["classes"] != first.metrics["classes"]:
            raise ConfigError(
                f"{first.name} has the classes {', '.join(first.metrics['classes'])}, {run.name} "
                f"has {', '.join(run.metrics['classes'])}; compare runs on the same data"
            )
        kinds = [(r.predictions.labels.dim(), r.predictions.labels.dtype) for r in (first, run)]
        if kinds[0] != kinds[1]:
            raise ConfigError(
                f"{first.name} and {run.name} must both be of classes, of findings, or of numbers; "
                "compare runs on the same data"
            )
    return tuple(first.metrics["classes"])


def _pairs(
    runs: Sequence[ComparedRun],
    predictions: Sequence[Predictions],
    classes: Sequence[str],
    items: Mapping[str, ImageItem],
    level: float,
    resamples: int,
) -> tuple[list[Pair], list[str]]:
    """The tests, on the images that all runs have, and what must be said of them."""
    keys = predictions[0].keys
    notes = []
    if not keys:
        return [], [
            "No image is in the predictions of all runs: nothing is tested, and metrics and curves "
            "are of different images."
        ]
    if any(len(run.predictions.keys) != len(keys) for run in runs):
        notes.append(
            f"The runs have {len(keys)} images in common: differences and disagreements are of "
            "those, metrics and curves of all images of each run."
        )
    groups = known_patients(keys, items)
    if groups is not None:
        notes.append(
            "Images of one patient are not independent, which DeLong's test takes them to be: "
            "its p is too small. The other intervals of differences draw whole patients."
        )
    count = len(runs)
    numbers = [(0, second) for second in range(1, count)]
    if count <= ALL_PAIRS:
        numbers = [(first, second) for first in range(count) for second in range(first + 1, count)]
    pairs = []
    for first, second in numbers:
        try:
            comparison = compare_predictions(
                predictions[first], predictions[second], classes,
                level=level, resamples=resamples, groups=groups,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(
                f"{runs[first].name} and {runs[second].name} cannot be compared: {error}"
            ) from error
        pairs.append(Pair(first, second, comparison))
    return pairs, notes
