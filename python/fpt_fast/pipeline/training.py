"""Training and evaluation: from features and labels to a tested classifier and a report."""

import dataclasses
import json
import logging
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fpt_fast.backbone import backbone_name
from fpt_fast.cache import CacheMismatch, CacheReader
from fpt_fast.config import (
    REGRESSION_LOSSES,
    AugmentConfig,
    ConfigError,
    FptConfig,
    TrainConfig,
    format_layers,
    parse_layers,
    preset,
)
from fpt_fast.images import DecodedStore, dataset_preset
from fpt_fast.loader import (
    CachedFeatures,
    FeatureLoader,
    FeatureSource,
    LiveFeatures,
    NoFeatures,
)
from fpt_fast.metrics import Metrics, compute_metrics
from fpt_fast.model import FptModel
from fpt_fast.pipeline.data import open_image_set
from fpt_fast.pipeline.examples import token_examples
from fpt_fast.pipeline.features import FeaturePlan, make_plan
from fpt_fast.records import (
    ImageSet,
    Predictions,
    Preprocessing,
    Split,
    TrainingHistory,
)
from fpt_fast.report import write_report, write_run_files
from fpt_fast.settings import (
    EvaluateSettings,
    TrainSettings,
    build_settings,
    parse_size,
    parse_values,
    to_yaml_values,
)
from fpt_fast.trainer import fit
from fpt_fast.trainer import predict as predict_batches

log = logging.getLogger("fpt_fast")

CONFIG_FILE = "config.yaml"
BEST = "best"


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


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Everything that a run reads, opened: data, features, and how to make the model's input."""

    images: ImageSet
    plan: FeaturePlan
    features: FeatureSource
    frozen_features: LiveFeatures | None
    side: Preprocessing
    store: DecodedStore
    reader: CacheReader | None


def train(settings: TrainSettings | None = None, **values: Any) -> TrainResult:
    """Train a classifier and test its best epoch; see ``TrainSettings`` for the arguments.

    The run's directory gets ``config.yaml``, ``metrics.json``, ``history.csv``,
    ``predictions.csv``, ``report.html``, ``best/`` (the model) and ``last/`` (to resume from).
    """
    settings = settings or build_settings(TrainSettings, values)
    _refuse_ignored(settings)
    _claim_run(settings)
    with ExitStack() as stack:
        inputs, method = _open_inputs(settings, stack)
        recipe = _recipe(settings)
        classes = inputs.images.classes
        torch.manual_seed(settings.seed)
        model = FptModel(method, inputs.plan.spec, 1 if recipe.is_regression else len(classes))
        _write_config(settings, inputs, method, recipe)
        train_loader = _loader(inputs, settings, "train")
        val_items = inputs.images.of_split("val")
        history = fit(
            model,
            train_loader,
            _loader(inputs, settings, "val") if val_items else None,
            recipe,
            run_dir=settings.run,
            device=settings.device,
            resume=settings.resume,
            num_classes=len(classes),
            class_counts=_class_counts(inputs.images),
            callbacks=_callbacks(settings),
            extra=_model_extra(inputs, recipe),
        )
        best = FptModel.from_pretrained(settings.run / BEST)
        split: Split = "test" if inputs.images.of_split("test") else "val" if val_items else "train"
        if split != "test":
            log.warning("there are no test images; the metrics are those of the %s split", split)
        predictions = predict_batches(
            best,
            _loader(inputs, settings, split),
            device=settings.device,
            regression=recipe.is_regression,
        )
        metrics = compute_metrics(predictions, len(classes))
        report = _write_results(settings, inputs, history, predictions, metrics, split)
    return TrainResult(settings.run, history, split, metrics, report)


def evaluate(settings: EvaluateSettings | None = None, **values: Any) -> Metrics:
    """Evaluate a run's best model on a split; writes ``metrics-SPLIT.json`` and
    ``predictions-SPLIT.csv`` into the run; see ``EvaluateSettings`` for the arguments."""
    settings = settings or build_settings(EvaluateSettings, values)
    trained = read_run_settings(settings.run)
    changes: dict[str, Any] = {
        "run": settings.run,
        "device": settings.device,
        "batch_size": settings.batch_size,
    }
    if settings.data is not None:
        changes["data"] = settings.data
    if settings.cache is not None:
        changes["cache"] = settings.cache
    trained = dataclasses.replace(trained, **changes)
    model = FptModel.from_pretrained(settings.run / BEST)
    recipe = _recipe(trained)
    with ExitStack() as stack:
        recorded = tuple(model.extra["classes"])
        inputs, _ = _open_inputs(trained, stack, trained_model=model)
        items = inputs.images.of_split(settings.split)
        if not items:
            raise ConfigError(
                f"the data has no images in the {settings.split} split; choose another --split"
            )
        predictions = predict_batches(
            model,
            _loader(inputs, trained, settings.split),
            device=settings.device,
            regression=recipe.is_regression,
        )
        metrics = compute_metrics(predictions, len(recorded))
    write_run_files(
        settings.run,
        predictions=predictions,
        classes=recorded,
        metrics=metrics,
        suffix=f"-{settings.split}",
    )
    return metrics


def read_run_settings(run: Path) -> TrainSettings:
    """The settings that a run was trained with, from its ``config.yaml``."""
    path = run / CONFIG_FILE
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{run} is not a run of fpt-fast: cannot read {path} ({error.strerror})"
        ) from error
    return build_settings(
        TrainSettings, parse_values(TrainSettings, values.get("settings"), str(path))
    )


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


def _claim_run(settings: TrainSettings) -> None:
    """Make the run's directory; refuse one that holds an earlier run."""
    if settings.resume and settings.overwrite:
        raise ConfigError("--resume and --overwrite exclude each other; give one")
    if settings.resume:
        if not (settings.run / "last").is_dir():
            raise ConfigError(
                f"nothing to resume: {settings.run} has no finished epoch; leave --resume out"
            )
        return
    if settings.run.exists() and any(settings.run.iterdir()):
        if not settings.overwrite:
            raise RunExists(
                f"{settings.run} holds an earlier run; choose another --run, continue it with "
                "--resume, or replace it with --overwrite"
            )
        if not (settings.run / CONFIG_FILE).exists():
            raise RunExists(
                f"{settings.run} is not empty and is not a run of fpt-fast; it will not be "
                "overwritten: choose another --run"
            )
        shutil.rmtree(settings.run)
    settings.run.mkdir(parents=True, exist_ok=True)


def _open_inputs(
    settings: TrainSettings, stack: ExitStack, trained_model: FptModel | None = None
) -> tuple[_Inputs, FptConfig]:
    """Open data and features: those of a model's own method where one is trained already."""
    live = settings.cache == "none"
    # With a cache every image was readable when it was made; a live pass has nobody to vouch.
    images = open_image_set(settings, check=live)
    if trained_model is not None:
        _require_classes(images, tuple(trained_model.extra["classes"]))
    method = None if trained_model is None else trained_model.config
    store = DecodedStore()
    if live:
        return _open_live(settings, images, store, method)
    reader = stack.enter_context(CacheReader(Path(settings.cache)))
    plan = FeaturePlan.from_json({**reader.fingerprint, **reader.notes})
    if method is None:
        plan.require(
            backbone=None if settings.backbone is None else backbone_name(settings.backbone),
            layers=None if settings.layers is None else parse_layers(settings.layers),
            token_ratio=settings.token_ratio,
            importance=settings.importance,
            input_size=_optional_size("input_size", settings.input_size),
        )
        method = _method(settings, plan)
    _require_layers(plan, method)
    images = _only_cached(images, reader) if settings.skip_unreadable else images
    features: FeatureSource = (
        CachedFeatures(reader, images.items) if method.fusion else NoFeatures()
    )
    side = dataclasses.replace(plan.preprocessing, size=method.side_size)
    return _Inputs(images, plan, features, None, side, store, reader), method


def _require_classes(images: ImageSet, trained: tuple[str, ...]) -> None:
    if images.classes != trained:
        raise ConfigError(
            f"the data has the classes {', '.join(images.classes)}, but the run was trained on "
            f"{', '.join(trained)}; evaluate on data with the same classes"
        )


def _require_layers(plan: FeaturePlan, method: FptConfig) -> None:
    """A cache made for the other method has other layers: never train on it unasked."""
    wanted = method.resolve_layers(plan.spec.depth)
    if plan.layers != wanted:
        raise CacheMismatch(
            f"the feature cache holds layers {format_layers(plan.layers)}, but {method.method} "
            f"learns from layers {format_layers(wanted)} of {plan.spec.name}; preload for this "
            f"method, or say --layers {format_layers(plan.layers)} to learn from these"
        )


def _open_live(
    settings: TrainSettings, images: ImageSet, store: DecodedStore, method: FptConfig | None
) -> tuple[_Inputs, FptConfig]:
    if settings.backbone is None:
        raise ConfigError(
            "--cache none needs --backbone, the frozen model to run on every batch; or name a "
            "cache made by fpt-fast preload"
        )
    method = method or _method(settings, None)
    plan, backbone = make_plan(
        settings, settings.backbone, settings.input_size or "512", method, images
    )
    frozen = plan.frozen_pass(backbone)
    augment = AugmentConfig() if settings.augment_input else None
    side = dataclasses.replace(plan.preprocessing, size=method.side_size)
    features: FeatureSource = LiveFeatures(frozen, augment) if method.fusion else NoFeatures()
    return _Inputs(images, plan, features, LiveFeatures(frozen), side, store, None), method


def _method(settings: TrainSettings, plan: FeaturePlan | None) -> FptConfig:
    """The method's configuration; what a cache has settled is taken from it."""
    changes: dict[str, Any] = {"fusion": settings.fusion}
    if plan is not None:
        changes |= {"token_ratio": plan.token_ratio, "importance": plan.importance}
        if settings.layers is not None:
            changes["layers"] = plan.layers
    else:
        if settings.layers is not None:
            changes["layers"] = parse_layers(settings.layers)
        if settings.token_ratio is not None:
            changes["token_ratio"] = settings.token_ratio
        if settings.importance is not None:
            changes["importance"] = settings.importance
    if settings.num_prompts is not None:
        changes["num_prompts"] = settings.num_prompts
    if settings.side_reduction is not None:
        changes["side_reduction"] = settings.side_reduction
    if settings.side_size is not None:
        changes["side_size"] = parse_size("side_size", settings.side_size)
    return preset(settings.method, **changes)


def _recipe(settings: TrainSettings) -> TrainConfig:
    rate = settings.learning_rate
    if rate is None:
        rate = 1e-4 if settings.preset is None else dataset_preset(settings.preset).learning_rate
    monitor = settings.monitor
    if monitor is None:
        # A grade has no AUC.
        monitor = "mae" if settings.loss in REGRESSION_LOSSES else "auc"
    return TrainConfig(
        learning_rate=rate,
        monitor=monitor,
        **{
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(TrainConfig)
            if field.name not in ("learning_rate", "monitor") and hasattr(settings, field.name)
        },
    )


def _loader(inputs: _Inputs, settings: TrainSettings, split: Split) -> FeatureLoader:
    training = split == "train"
    features = inputs.features
    if not training and isinstance(features, LiveFeatures) and inputs.frozen_features is not None:
        features = inputs.frozen_features
    return FeatureLoader(
        inputs.images.of_split(split),
        features,
        inputs.side,
        batch_size=settings.batch_size,
        store=inputs.store,
        augmentation=AugmentConfig() if training and settings.augment else None,
        shuffle=training,
        seed=settings.seed,
        workers=settings.workers,
    )


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


def _model_extra(inputs: _Inputs, recipe: TrainConfig) -> dict[str, Any]:
    """What prediction needs beside the model, kept in its ``config.json``."""
    return {
        "classes": list(inputs.images.classes),
        "features": inputs.plan.to_json(),
        "regression": recipe.is_regression,
    }


def _write_config(
    settings: TrainSettings, inputs: _Inputs, method: FptConfig, recipe: TrainConfig
) -> None:
    values = {
        "settings": to_yaml_values(settings)
        | {"data": str(settings.data.resolve()), "cache": _absolute_cache(settings.cache)},
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
    inputs: _Inputs,
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


def _only_cached(images: ImageSet, reader: CacheReader) -> ImageSet:
    """With ``--skip-unreadable``, the images that preloading skipped are skipped here too."""
    known = set(reader.keys)
    missing = [item.key for item in images.items if item.key not in known]
    if missing:
        log.warning("going on without %d images that the cache lacks", len(missing))
    return dataclasses.replace(
        images, items=tuple(item for item in images.items if item.key in known)
    )


def _absolute_cache(cache: str) -> str:
    return cache if cache == "none" else str(Path(cache).resolve())


def _optional_size(name: str, text: str | None) -> tuple[int, int] | None:
    return None if text is None else parse_size(name, text)
