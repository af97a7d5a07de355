"""Training: from features and labels to a tested classifier and a report."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
import yaml

from fpt_fast.config import (
    ConfigError,
    FptConfig,
    TrainConfig,
)
from fpt_fast.metrics import Metrics, compute_metrics
from fpt_fast.model import FptModel
from fpt_fast.pipeline.examples import token_examples
from fpt_fast.pipeline.features import recorded_source
from fpt_fast.pipeline.inputs import RunInputs, make_loader, make_recipe, open_inputs
from fpt_fast.records import (
    ImageSet,
    Predictions,
    Split,
    TrainingHistory,
)
from fpt_fast.report import write_report, write_run_files
from fpt_fast.settings import (
    TrainSettings,
    build_settings,
    parse_steps,
    to_yaml_values,
)
from fpt_fast.trainer import deterministic_algorithms, fit
from fpt_fast.trainer import predict as predict_batches

log = logging.getLogger("fpt_fast")

CONFIG_FILE = "config.yaml"
BEST = "best"
# What the trainer leaves of a finished epoch or step, whenever it is killed.
CHECKPOINTS = frozenset({"last", "last.old"})


class RunExists(FileExistsError):
    """A run's directory holds an earlier run."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run: where it is, how training went, and its metrics on the evaluated split."""

    run: Path
    history: TrainingHistory
    split: Split
    metrics: Metrics
    report: Path


def train(settings: TrainSettings | None = None, **values: Any) -> TrainResult:
    """Train a classifier and test its best epoch; see ``TrainSettings`` for the arguments.

    The run's directory gets ``config.yaml``, ``metrics.json``, ``history.csv``,
    ``predictions.csv``, ``report.html``, ``best/`` (the model) and ``last/`` (to resume from).
    """
    settings = settings or build_settings(TrainSettings, values)
    _refuse_ignored(settings)
    _check_run(settings)
    profiled = parse_steps("profile_steps", settings.profile_steps)
    with ExitStack() as stack:
        stack.enter_context(deterministic_algorithms(settings.deterministic))
        inputs, method = open_inputs(settings, stack)
        recipe = make_recipe(settings)
        classes = inputs.images.classes
        torch.manual_seed(settings.seed)
        model = FptModel(method, inputs.plan.spec, 1 if recipe.is_regression else len(classes))
        train_loader = make_loader(inputs, settings, "train", repeated=True)
        val_items = inputs.images.of_split("val")
        val_loader = make_loader(inputs, settings, "val", repeated=True) if val_items else None
        with _run_directory(settings):
            if not settings.resume:
                _write_config(settings, inputs, method, recipe)
            history = fit(
                model,
                train_loader,
                val_loader,
                recipe,
                run_dir=settings.run,
                device=settings.device,
                resume=settings.resume,
                num_classes=len(classes),
                class_counts=_class_counts(inputs.images),
                callbacks=_callbacks(settings),
                extra=_model_extra(inputs, recipe),
                inputs=_identity(settings, inputs, method),
                checkpoint_steps=settings.checkpoint_steps,
                profile_steps=profiled,
            )
        best = FptModel.from_pretrained(settings.run / BEST)
        split: Split = "test" if inputs.images.of_split("test") else "val" if val_items else "train"
        if split != "test":
            log.warning("there are no test images; the metrics are those of the %s split", split)
        predictions = predict_batches(
            best,
            make_loader(inputs, settings, split),
            device=settings.device,
            regression=recipe.is_regression,
        )
        metrics = compute_metrics(predictions, len(classes))
        report = _write_results(settings, inputs, history, predictions, metrics, split)
    return TrainResult(settings.run, history, split, metrics, report)


def _refuse_ignored(settings: TrainSettings) -> None:
    """A setting that a cache has settled must not look as if it did something."""
    if settings.cache == "none":
        return
    live = ("checkpoint_path", "normalization", "mean", "std", "position_interpolation", "dtype")
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    given = [name for name in (*live, "augment_input") if getattr(settings, name) != defaults[name]]
    if given:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ConfigError(
            f"{flags}: goes with --cache none only, since the features of a cache are made; leave "
            "it out, or preload with it"
        )


def _check_run(settings: TrainSettings) -> None:
    """Refuse a directory that holds an earlier run, unless told what to do with it."""
    if settings.resume and settings.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one")
    found = {path.name for path in settings.run.iterdir()} if settings.run.is_dir() else set()
    if settings.resume:
        if not found & CHECKPOINTS:
            raise ConfigError(
                f"nothing to resume: {settings.run} has no checkpoint; leave --resume out"
            )
    elif found and CONFIG_FILE not in found:
        raise RunExists(
            f"{settings.run} is not empty and is not a run of fpt-fast; it will not be "
            "overwritten: choose another --run"
        )
    elif found & (CHECKPOINTS | {"metrics.json"}) and not settings.overwrite:
        raise RunExists(
            f"{settings.run} holds an earlier run; choose another --run, continue it with "
            "--resume, or replace it with --overwrite"
        )


@contextmanager
def _run_directory(settings: TrainSettings) -> Iterator[None]:
    """The run's directory: as it is to resume, else empty.

    What it replaces is put aside, and comes back if the new run fails before its first
    checkpoint.
    """
    run = settings.run
    aside = run.with_name(f".{run.name}.replaced")
    if settings.resume or not run.exists():
        run.mkdir(parents=True, exist_ok=True)
        yield
        return
    shutil.rmtree(aside, ignore_errors=True)
    run.rename(aside)
    run.mkdir()
    try:
        yield
    except BaseException:
        if not any((run / name).exists() for name in CHECKPOINTS):
            shutil.rmtree(run)
            aside.rename(run)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _identity(settings: TrainSettings, inputs: RunInputs, method: FptConfig) -> dict[str, Any]:
    """What must be the same for a run to be resumed, beside the recipe."""
    images = [(item.key, item.label, item.split) for item in inputs.images.items]
    return {
        "method": method.to_json(),
        "features": inputs.plan.fingerprint(),
        "images": xxhash.xxh3_128_hexdigest(json.dumps(images).encode()),
        "augment": settings.augment,
        "augment_input": settings.augment_input,
        "side_images": settings.side_images,
        "deterministic": settings.deterministic,
    }


def _class_counts(images: ImageSet) -> list[int]:
    counts = [0] * len(images.classes)
    for item in images.of_split("train"):
        counts[item.label] += 1
    return counts


def _callbacks(settings: TrainSettings) -> tuple[Any, ...]:
    if not settings.tensorboard:
        return ()
    from fpt_fast.tracking import TensorBoardCallback

    return (TensorBoardCallback(settings.run / "tensorboard"),)


def _model_extra(inputs: RunInputs, recipe: TrainConfig) -> dict[str, Any]:
    """What prediction needs beside the model, kept in its ``config.json``."""
    return {
        "classes": list(inputs.images.classes),
        "features": inputs.plan.to_json(),
        "regression": recipe.is_regression,
    }


def _write_config(
    settings: TrainSettings, inputs: RunInputs, method: FptConfig, recipe: TrainConfig
) -> None:
    values = {
        "settings": to_yaml_values(settings)
        | {
            "data": str(settings.data.resolve()),
            "cache": _absolute_cache(settings.cache),
            "backbone": None if settings.backbone is None else recorded_source(settings.backbone),
            "checkpoint_path": _absolute(settings.checkpoint_path),
            "side_cache": _absolute(settings.side_cache),
        },
        "method": method.to_json(),
        "training": recipe.to_json(),
        "features": inputs.plan.to_json(),
        "classes": list(inputs.images.classes),
    }
    # Through JSON, so that YAML sees lists and no Python tuples.
    text = yaml.safe_dump(json.loads(json.dumps(values)), sort_keys=False, allow_unicode=True)
    (settings.run / CONFIG_FILE).write_text(text, encoding="utf-8")


def _write_results(
    settings: TrainSettings,
    inputs: RunInputs,
    history: TrainingHistory,
    predictions: Predictions,
    metrics: Metrics,
    split: Split,
) -> Path:
    classes = inputs.images.classes
    write_run_files(
        settings.run, predictions=predictions, classes=classes, metrics=metrics, history=history
    )
    examples = token_examples(
        inputs.images.of_split(split),
        predictions,
        inputs.plan,
        inputs.reader,
        inputs.store,
        count=settings.report_images if settings.fusion else 0,
    )
    return write_report(
        settings.run,
        history=history,
        predictions=predictions,
        classes=classes,
        metrics=metrics,
        examples=examples,
        split=split,
        settings={key: value for key, value in to_yaml_values(settings).items() if value != []},
    )


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _absolute_cache(cache: str) -> str:
    return cache if cache == "none" else str(Path(cache).resolve())
