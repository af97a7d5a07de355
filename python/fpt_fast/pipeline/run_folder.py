"""A run's directory: what may be replaced, and the files that training leaves in it."""

import json
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xxhash
import yaml

from fpt_fast.config import ConfigError, FptConfig, TrainConfig, format_layers
from fpt_fast.files import replaced_folder
from fpt_fast.hub import is_repository
from fpt_fast.images import labels_of
from fpt_fast.model import FptModel
from fpt_fast.model_files import CONFIG_FILE as MODEL_CONFIG
from fpt_fast.peers import PeerConfig, PeerModel
from fpt_fast.pipeline.examples import draw_thumbnails, token_examples
from fpt_fast.pipeline.features import FeaturePlan, recorded_source
from fpt_fast.pipeline.inputs import RunInputs
from fpt_fast.pipeline.peer_plan import PeerPlan
from fpt_fast.pipeline.settled import as_found
from fpt_fast.records import ImageSet, Predictions, Split, TokenExample, TrainingHistory
from fpt_fast.report import write_predictions, write_report, write_run_files
from fpt_fast.run_settings import RunSettings, TrainSettings
from fpt_fast.setting_values import to_yaml_values
from fpt_fast.trust import Assessment

CONFIG_FILE = "config.yaml"
BEST = "best"
# Predictions on the validation images that temperature and thresholds are chosen on.
VALIDATION_FILE = "validation.csv"
# What the trainer leaves of a finished epoch or step, whenever it is killed.
CHECKPOINTS = frozenset({"last", "last.old"})


class RunExists(FileExistsError):
    """A run's directory holds an earlier run."""


def check_run_folder(
    run: Path, *, resume: bool, overwrite: bool, checkpoints: Set[str] = CHECKPOINTS
) -> None:
    """Refuse a directory that holds an earlier run, unless told what to do with it.

    ``checkpoints`` are the names of which one is there once there is something to resume.
    """
    if resume and overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one")
    found = {path.name for path in run.iterdir()} if run.is_dir() else set()
    if resume:
        if not found & checkpoints:
            raise ConfigError(
                f"nothing to resume: {run.resolve()} has no checkpoint; name the folder that has "
                "one, with --run (it goes before the run that a --config names, which may have "
                "been moved), or leave --resume out to train from the start, there"
            )
    elif found and CONFIG_FILE not in found:
        raise RunExists(
            f"{run} is not empty and is not a run of fpt-fast; it will not be "
            "overwritten: choose another --run"
        )
    elif found & (checkpoints | {"metrics.json"}) and not overwrite:
        raise RunExists(
            f"{run} holds an earlier run; choose another --run, continue it with "
            "--resume, or replace it with --overwrite"
        )


def read_best_model(run: Path) -> FptModel:
    """The best model of a run's folder, or the one that was shared: a folder, or OWNER/NAME."""
    return FptModel.from_pretrained(model_folder(run))


def model_folder(run: Path) -> Path:
    """Where the model is: ``best`` of a run's folder, or what was shared, as it is."""
    if (run / BEST).exists():
        return run / BEST
    if (run / MODEL_CONFIG).is_file() or is_repository(str(run)):
        return run
    raise ConfigError(f"{run} holds no trained model{_what_it_is(run)}")


def members_of(run: Path) -> list[Path]:
    """The run itself, or of the folder of a sweep or a cross-validation all of its models."""
    return [run] if (run / BEST).exists() else _models_below(run) or [run]


def _models_below(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob(f"**/{BEST}") if path.is_dir())


def _what_it_is(run: Path) -> str:
    """What a folder without a model is, and what to name instead."""
    if not run.is_dir():
        return ": there is no such folder"
    models = _models_below(run)
    if not models:
        return "; train it first, or name the --run folder of fpt-fast train"
    shown = ", ".join(map(str, models[:4])) + (", ..." if len(models) > 4 else "")
    return f": it is a sweep or a cross-validation; name one of its models: {shown}"


def require_single_run(run: Path) -> None:
    """Raise ``ConfigError`` where ``run`` is a folder of models and not one run."""
    if run.is_dir() and not (run / BEST).exists() and any(run.glob(f"**/{BEST}")):
        raise ConfigError(f"{run} is not a run{_what_it_is(run)}")


@contextmanager
def open_run_folder(
    run: Path, *, resume: bool, checkpoints: Set[str] = CHECKPOINTS
) -> Iterator[None]:
    """The run's directory: as it is to resume, else empty.

    What it replaces is put aside, and comes back if the new run fails before its first
    checkpoint.
    """
    if resume or not run.exists():
        run.mkdir(parents=True, exist_ok=True)
        yield
        return
    with replaced_folder(run, lambda: any((run / name).exists() for name in checkpoints)):
        yield


def run_identity(
    settings: RunSettings, inputs: RunInputs, method: FptConfig | PeerConfig
) -> dict[str, Any]:
    """What must be the same for a run to be resumed, beside the recipe."""
    images = [
        (
            *(item.key, item.label, item.split),
            *([item.findings] if item.findings else []),
            *([] if item.value is None else [item.value]),
        )
        for item in inputs.images.items
    ]
    return {
        "method": method.to_json(),
        "features": inputs.plan.fingerprint(),
        "images": xxhash.xxh3_128_hexdigest(json.dumps(images).encode()),
        "augment": settings.augment,
        "augment_input": settings.augment_input,
        "side_images": settings.side_images,
        "deterministic": settings.deterministic,
        "sampling": settings.sampling,
    }


def class_counts(images: ImageSet) -> list[int] | None:
    """Training images of each class; of findings, those with each, then those without each; of
    numbers, None."""
    if images.task == "regression":
        return None
    if images.task == "multilabel":
        labels = labels_of(images.of_split("train"))
        having, lacking = (labels == 1).sum(dim=0), (labels == 0).sum(dim=0)
        return [*having.tolist(), *lacking.tolist()]
    counts = [0] * len(images.classes)
    for item in images.of_split("train"):
        counts[item.label] += 1
    return counts


def model_extra(inputs: RunInputs, recipe: TrainConfig) -> dict[str, Any]:
    """What prediction needs beside the model, kept in its ``config.json``."""
    return {
        "classes": list(inputs.images.classes),
        "features": inputs.plan.to_json(),
        "regression": recipe.is_regression,
        **({"task": inputs.images.task} if inputs.images.task != "multiclass" else {}),
        # The model's output times the deviation, plus the mean, is the number.
        **({} if recipe.target is None else {"target": list(recipe.target)}),
    }


def write_config(
    settings: RunSettings,
    inputs: RunInputs,
    method: FptConfig | PeerConfig,
    recipe: TrainConfig,
) -> None:
    """Write ``config.yaml``: what was asked for, and what came of it.

    What shaped the features stands in both, but for ``layers``, which may be the method's own."""
    found = as_found(settings, inputs.plan)
    values = {
        "settings": to_yaml_values(found)
        | {
            "run": str(settings.run.resolve()),
            "data": str(settings.data.resolve()),
            "cache": _absolute_cache(settings.cache),
            "backbone": None if found.backbone is None else recorded_source(found.backbone),
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


def write_results(
    settings: TrainSettings,
    inputs: RunInputs,
    history: TrainingHistory,
    predictions: Predictions,
    assessment: Assessment,
    split: Split,
    validation: Predictions | None,
    model: FptModel | PeerModel,
) -> Path:
    """Write metrics, history, predictions and the report of a trained run; returns the report.

    ``validation`` are the predictions that temperature and thresholds were chosen on: they are
    kept, so that other data can be judged by them.
    """
    classes = inputs.images.classes
    if validation is not None:
        write_predictions(settings.run / VALIDATION_FILE, validation, classes)
    write_run_files(
        settings.run,
        predictions=predictions,
        classes=classes,
        assessment=assessment,
        history=history,
    )
    examples: list[TokenExample] = []
    if isinstance(model, FptModel) and isinstance(inputs.plan, FeaturePlan):
        examples = token_examples(
            inputs.images.of_split(split),
            predictions,
            inputs.plan,
            inputs.reader,
            inputs.store,
            model,
            num_classes=len(classes),
            count=settings.report_images,
        )
    return write_report(
        settings.run,
        history=history,
        predictions=predictions,
        classes=classes,
        assessment=assessment,
        examples=examples,
        thumbnails=draw_thumbnails(
            inputs.images.of_split(split),
            predictions,
            inputs.store,
            num_classes=len(classes),
            count=settings.report_thumbnails,
        ),
        split=split,
        settings=_settings_shown(settings, inputs.plan),
    )


def _settings_shown(settings: RunSettings, plan: FeaturePlan | PeerPlan) -> dict[str, Any]:
    """The report's settings: what was asked for, and what shaped the features in any case."""
    shown = to_yaml_values(as_found(settings, plan))
    if isinstance(plan, FeaturePlan):
        shown["layers"] = format_layers(plan.layers)
    return {key: value for key, value in shown.items() if value != []}


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _absolute_cache(cache: str) -> str:
    return cache if cache == "none" else str(Path(cache).resolve())
