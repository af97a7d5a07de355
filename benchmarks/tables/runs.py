"""Every row of a table trained with every seed; what is there already is not trained again."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables.variants import Options, Variant
from fpt_fast.pipeline import preload, train
from fpt_fast.records import Predictions

SETTINGS_FILE = "table-row.json"


@dataclass(frozen=True)
class Run:
    """One trained row: its seed, its folder, its test predictions, the names of its classes, and
    its learning rate where the table searched for it."""

    variant: Variant
    seed: int
    folder: Path
    predictions: Predictions
    classes: tuple[str, ...]
    rate: float | None = None


def run_all(variants: list[Variant], options: Options) -> Iterator[Run]:
    """Preload what is needed, then train row by row, seed by seed.

    A run whose folder holds results of the same settings is read; one of other settings, or
    without results, is trained anew.
    """
    for variant in variants:
        rate = rate_of(variant, options)
        for seed in range(options.seeds):
            folder = run(variant, options, seed, rate)
            predictions, classes = read_predictions(folder / "predictions.csv")
            yield Run(variant, seed, folder, predictions, classes, rate)


def run(variant: Variant, options: Options, seed: int, rate: float | None) -> Path:
    """The folder of one run, trained if it is not there; ``rate`` None leaves it to the row."""
    name = f"seed-{seed}" if rate is None else f"seed-{seed}-rate-{rate:g}"
    folder = options.output / "runs" / variant.name / name
    settings = train_settings(variant, options, seed, rate)
    if not is_done(folder, settings):
        make_cache(variant, options)
        train(**settings, run=folder, overwrite=folder.exists())
        (folder / SETTINGS_FILE).write_text(json.dumps(_plain(settings), indent=1))
    return folder


def rate_of(variant: Variant, options: Options) -> float | None:
    """The row's learning rate: one found before, or the one of ``options.search`` with which the
    first seed's best validation AUC is highest (of equals the lowest); None where neither is given.
    """
    if variant.name in options.rates:
        return options.rates[variant.name]
    found = {rate: best_validation(run(variant, options, 0, rate)) for rate in options.search}
    return min(found, key=lambda rate: (-found[rate], rate)) if found else None


def best_validation(folder: Path) -> float:
    """The highest validation AUC of a run's epochs."""
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        return max(float(row["val_auc"]) for row in csv.DictReader(file))


def make_cache(variant: Variant, options: Options) -> None:
    """Preload the features of a row; a finished cache is left as it is."""
    cache = variant.cache(options)
    if cache is not None:
        preload(
            data=options.data,
            backbone=options.backbone,
            cache=cache,
            method=variant.method,
            token_ratio=variant.token_ratio,
            input_size=str(options.input_size),
            normalization=options.normalization,
            workers=options.workers,
        )


def train_settings(
    variant: Variant, options: Options, seed: int, rate: float | None = None
) -> dict[str, Any]:
    """Arguments of ``train`` but for the run's folder."""
    cache = variant.cache(options)
    shared: dict[str, Any] = {
        "data": options.data,
        "method": variant.method,
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "seed": seed,
        "report_images": 0,
        "workers": options.workers,
    }
    if cache is not None:
        shared["cache"] = str(cache)
    if options.learning_rate is not None:
        shared["learning_rate"] = options.learning_rate
    given = shared | dict(variant.train)
    if rate is not None:
        given["learning_rate"] = rate
    return {name: value for name, value in given.items() if value is not None}


def is_done(folder: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the folder holds a run of these settings."""
    path = folder / SETTINGS_FILE
    return path.is_file() and json.loads(path.read_text()) == _plain(settings)


def read_predictions(path: Path) -> tuple[Predictions, tuple[str, ...]]:
    """Predictions and class names of a run's ``predictions.csv``; its logits are the logarithms of
    the probabilities."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = [name for name in rows[0] if name.startswith("probability_")]
    classes = tuple(name.removeprefix("probability_") for name in names)
    labels = torch.tensor([classes.index(row["label"]) for row in rows])
    chances = torch.tensor([[float(row[name]) for name in names] for row in rows])
    logits = chances.clamp_min(1e-30).log()
    return Predictions(tuple(row["key"] for row in rows), labels, logits, chances), classes


def record(options: Options) -> dict[str, Any]:
    """The options as JSON values."""
    return _plain(asdict(options))


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain
