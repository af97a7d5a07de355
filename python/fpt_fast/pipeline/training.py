"""Training: from features and labels to a tested classifier and a report."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fpt_fast.config import FptConfig, TrainConfig
from fpt_fast.distributed import World, open_world
from fpt_fast.loader import FeatureLoader
from fpt_fast.metrics import Metrics
from fpt_fast.model import FptModel
from fpt_fast.peers import PeerConfig, PeerModel
from fpt_fast.pipeline.data import patients_of
from fpt_fast.pipeline.grades import GRADE_CUTS, learn_cuts, with_cuts
from fpt_fast.pipeline.inputs import RunInputs, make_loader, open_inputs
from fpt_fast.pipeline.memory import report_memory
from fpt_fast.pipeline.peers import is_peer, open_peer_inputs, settle_method
from fpt_fast.pipeline.recipe import make_recipe
from fpt_fast.pipeline.run_folder import (
    BEST,
    check_run_folder,
    class_counts,
    model_extra,
    open_run_folder,
    run_identity,
    write_config,
    write_results,
)
from fpt_fast.pipeline.settled import refuse_ignored
from fpt_fast.records import Predictions, Split, TrainingHistory
from fpt_fast.report import REPORT_FILE
from fpt_fast.run_settings import TrainSettings
from fpt_fast.setting_values import build_settings, parse_steps
from fpt_fast.trainer import (
    choose_capture,
    deterministic_algorithms,
    fit,
    load_weights,
    resolve_device,
)
from fpt_fast.trainer import predict as predict_batches
from fpt_fast.trust import Assessment, assess

log = logging.getLogger("fpt_fast")


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run: where it is, how training went, and its assessment on the split."""

    run: Path
    history: TrainingHistory
    split: Split
    assessment: Assessment
    report: Path

    @property
    def metrics(self) -> Metrics:
        """The metrics without their intervals."""
        return self.assessment.metrics


def train(settings: TrainSettings | None = None, **values: Any) -> TrainResult:
    """Train a classifier and test its best epoch; see ``TrainSettings`` for the arguments.

    The run's directory gets ``config.yaml``, ``metrics.json``, ``history.csv``,
    ``predictions.csv``, ``report.html``, ``memory.json`` (what took how much), ``best/`` (the
    model) and ``last/`` (to resume from).  The ranks of ``torchrun`` train one model together.
    """
    settings = settings or build_settings(TrainSettings, values)
    settings = settle_method(settings)
    refuse_ignored(settings)
    profiled = parse_steps("profile_steps", settings.profile_steps)
    with ExitStack() as stack:
        world = stack.enter_context(open_world(settings.device))
        if world.is_first:
            check_run_folder(settings.run, resume=settings.resume, overwrite=settings.overwrite)
        stack.enter_context(deterministic_algorithms(settings.deterministic))
        inputs, method, make_model = _open(settings, stack, world)
        recipe = make_recipe(settings, inputs.images)
        classes = inputs.images.classes
        torch.manual_seed(settings.seed)
        model = make_model(1 if recipe.is_regression else len(classes))
        device = resolve_device(settings.device)
        captured = choose_capture(settings.step, device, world.size)[0] is not None
        train_loader = make_loader(
            inputs, settings, "train", repeated=True, side_device=device if captured else None
        )
        val_items = inputs.images.of_split("val")
        val_loader = make_loader(inputs, settings, "val", repeated=True) if val_items else None
        with _run_folder(settings, world):
            if world.is_first and not settings.resume:
                write_config(settings, inputs, method, recipe)
            history = fit(
                model,
                train_loader,
                val_loader,
                recipe,
                run_dir=settings.run,
                device=settings.device,
                resume=settings.resume,
                num_classes=len(classes),
                class_names=classes,
                class_counts=class_counts(inputs.images),
                callbacks=_callbacks(settings) if world.is_first else (),
                extra=model_extra(inputs, recipe),
                inputs=run_identity(settings, inputs, method),
                checkpoint_steps=settings.checkpoint_steps,
                profile_steps=profiled,
                step=settings.step,
                world=world,
            )
        if world.is_first:
            report_memory(settings.run, inputs, (train_loader, val_loader), model)
            load_weights(model, settings.run / BEST)
        world.copy_first(list(model.state_dict().values()), "reading the best epoch")
        split, predictions, validation = _predict(model, inputs, settings, val_loader, recipe)
        chosen_on = predictions if split == "val" else validation
        cuts = learn_cuts(settings, recipe, chosen_on, len(classes))
        if cuts is not None:
            predictions = with_cuts(predictions, cuts)
            validation = None if validation is None else with_cuts(validation, cuts)
            if world.is_first:
                extra = {**model_extra(inputs, recipe), GRADE_CUTS: list(cuts)}
                model.save_pretrained(settings.run / BEST, extra=extra)
        assessment = assess(
            predictions,
            len(classes),
            groups=patients_of(inputs.images.of_split(split)),
            validation=validation,
            cuts_seen=split == "val",
            names=classes,
        )
        report = settings.run / REPORT_FILE
        if world.is_first:
            write_results(
                settings, inputs, history, predictions, assessment, split, validation, model
            )
    return TrainResult(settings.run, history, split, assessment, report)


def _predict(
    model: FptModel | PeerModel,
    inputs: RunInputs,
    settings: TrainSettings,
    val_loader: FeatureLoader | None,
    recipe: TrainConfig,
) -> tuple[Split, Predictions, Predictions | None]:
    """The split to be judged by, what ``model`` says of it, and of the validation images where
    those are others."""
    split: Split = "val" if val_loader is not None else "train"
    if inputs.images.of_split("test"):
        split = "test"
    else:
        log.warning("there are no test images; the metrics are those of the %s split", split)

    def of(loader: FeatureLoader) -> Predictions:
        return predict_batches(
            model,
            loader,
            device=settings.device,
            regression=recipe.is_regression,
            target=recipe.target,
            world=inputs.world,
        )

    predictions = of(make_loader(inputs, settings, split))
    if val_loader is None or split == "val":
        return split, predictions, None
    return split, predictions, of(val_loader)


def _open(
    settings: TrainSettings, stack: ExitStack, world: World
) -> tuple[RunInputs, FptConfig | PeerConfig, Callable[[int], FptModel | PeerModel]]:
    """What the run reads, its method, and what makes the model with so many outputs."""
    if is_peer(settings):
        peer_inputs, plan, peer, backbone = open_peer_inputs(settings, world)
        return peer_inputs, peer, partial(PeerModel, peer, backbone, source=plan.source)
    inputs, method = open_inputs(settings, stack, world)
    return inputs, method, partial(FptModel, method, inputs.plan.spec)


def _run_folder(settings: TrainSettings, world: World) -> AbstractContextManager[None]:
    if not world.is_first:
        return nullcontext()
    return open_run_folder(settings.run, resume=settings.resume)


def _callbacks(settings: TrainSettings) -> tuple[Any, ...]:
    if not settings.tensorboard:
        return ()
    from fpt_fast.tracking import TensorBoardCallback

    return (TensorBoardCallback(settings.run / "tensorboard"),)
