"""Evaluation of a trained run on any split of its data, or of other data with its classes."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from fpt_fast.config import ConfigError
from fpt_fast.distributed import World, open_world
from fpt_fast.model import FptModel
from fpt_fast.peers import PeerModel
from fpt_fast.pipeline.data import patients_of
from fpt_fast.pipeline.grades import cuts_of, target_of, with_cuts
from fpt_fast.pipeline.inputs import RunInputs, make_loader, reopen_inputs
from fpt_fast.pipeline.peers import is_peer, reopen_peer, settle_method
from fpt_fast.pipeline.run_folder import BEST, CONFIG_FILE, VALIDATION_FILE, require_single_run
from fpt_fast.records import Predictions, Split
from fpt_fast.report import read_predictions, write_run_files
from fpt_fast.run_settings import TrainSettings
from fpt_fast.setting_values import build_settings, parse_values, settings_of_run
from fpt_fast.settings import EvaluateSettings
from fpt_fast.trainer import predict as predict_batches
from fpt_fast.trust import Assessment, assess


def evaluate(settings: EvaluateSettings | None = None, **values: Any) -> Assessment:
    """Evaluate a run's best model on a split: metrics with confidence intervals, calibration and
    operating points, whose temperature and thresholds come from the run's validation images.

    Writes ``metrics-SPLIT.json`` and ``predictions-SPLIT.csv`` into the run; see
    ``EvaluateSettings`` for the arguments.
    """
    settings = settings or build_settings(EvaluateSettings, values)
    trained = read_run_settings(settings.run)
    changes: dict[str, Any] = {
        "run": settings.run,
        "device": settings.device,
        # Of the machine that it was trained on; here each image is read once.
        "features_on": "auto",
        "attention": settings.attention,
        "batch_size": settings.batch_size,
    }
    if settings.data is not None:
        changes["data"] = settings.data
    if settings.cache is not None:
        changes["cache"] = settings.cache
    trained = dataclasses.replace(trained, **changes)
    with ExitStack() as stack:
        world = stack.enter_context(open_world(settings.device))
        inputs, model = _reopen(settings, trained, stack, world)
        recorded = tuple(model.extra["classes"])
        items = inputs.images.of_split(settings.split)
        if not items:
            raise ConfigError(
                f"the data has no images in the {settings.split} split; choose another --split"
            )

        def predicted(split: Split) -> Predictions:
            found = predict_batches(
                model,
                make_loader(inputs, trained, split),
                device=settings.device,
                regression=bool(model.extra["regression"]),
                target=target_of(model.extra),
                world=world,
            )
            return with_cuts(found, cuts_of(model.extra))

        predictions = predicted(settings.split)
        validation: Predictions | None = None
        if settings.split != "val":
            # Those of the run's own validation images, whatever data it is evaluated on.
            if (settings.run / VALIDATION_FILE).is_file():
                validation, _ = read_predictions(settings.run / VALIDATION_FILE, recorded)
            elif settings.data is None and inputs.images.of_split("val"):
                validation = predicted("val")
        assessment = assess(
            predictions,
            len(recorded),
            validation=validation,
            at_sensitivity=settings.at_sensitivity,
            at_specificity=settings.at_specificity,
            resamples=settings.resamples,
            level=settings.level,
            method=settings.interval,
            groups=patients_of(items),
            cuts_seen=settings.split == "val" and settings.data is None,
            names=recorded,
        )
        if world.is_first:
            write_run_files(
                settings.run,
                predictions=predictions,
                classes=recorded,
                assessment=assessment,
                suffix=f"-{settings.split}",
            )
    return assessment


def _reopen(
    settings: EvaluateSettings, trained: TrainSettings, stack: ExitStack, world: World
) -> tuple[RunInputs, FptModel | PeerModel]:
    """The run's best model, and its data opened for it."""
    backbone, weights = settings.backbone, settings.checkpoint_path
    if is_peer(trained):
        settled = settle_method(trained)
        return reopen_peer(settled, backbone=backbone, checkpoint_path=weights, world=world)
    model = FptModel.from_pretrained(settings.run / BEST)
    inputs = reopen_inputs(
        trained, stack, model, backbone=backbone, checkpoint_path=weights, world=world
    )
    return inputs, model


def read_run_settings(run: Path) -> TrainSettings:
    """The settings that a run was trained with, from its ``config.yaml``."""
    require_single_run(run)
    path = run / CONFIG_FILE
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{run} is not a run of fpt-fast: cannot read {path} ({error.strerror})"
        ) from error
    if not isinstance(values, dict) or not isinstance(values.get("settings"), dict):
        raise ConfigError(f"{path} holds no settings; it was not written by fpt-fast train")
    return build_settings(
        TrainSettings, parse_values(TrainSettings, settings_of_run(values), str(path))
    )
