"""The training loop: the published recipe, resumable, bit for bit the same for one seed."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fpt_fast.config import ConfigError, TrainConfig
from fpt_fast.distributed import ALONE, World
from fpt_fast.interrupts import stop_on_signals
from fpt_fast.losses import build_loss
from fpt_fast.metrics import spoken
from fpt_fast.profiling import StepProfiler
from fpt_fast.records import EpochRecord, TrainingHistory
from fpt_fast.trainer.batches import EpochBatches, resolve_device
from fpt_fast.trainer.capture import Capture, StepChoice, choose_capture
from fpt_fast.trainer.checkpoint import save_best
from fpt_fast.trainer.epoch import run_epoch
from fpt_fast.trainer.memory import keep_freed_memory
from fpt_fast.trainer.progress import format_seconds, open_progress
from fpt_fast.trainer.ranks import require_same_weights
from fpt_fast.trainer.run import Run, resume_run
from fpt_fast.trainer.schedule import build_optimizer, check_schedule
from fpt_fast.trainer.static_step import StaticStep
from fpt_fast.trainer.step import OrdinaryStep
from fpt_fast.trainer.validation import check_monitor

LOGGER = logging.getLogger("fpt_fast")


class Callback(Protocol):
    """Told of each epoch that this call of ``fit`` trained, and of the whole at the end."""

    def on_epoch_end(self, record: EpochRecord) -> None:
        """An epoch ended, and its checkpoint is written."""

    def on_end(self, history: TrainingHistory) -> None:
        """Training ended."""


def fit(
    model: nn.Module,
    train_batches: EpochBatches,
    val_batches: EpochBatches | None,
    config: TrainConfig,
    *,
    run_dir: str | Path,
    num_classes: int,
    class_counts: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    extra: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    checkpoint_steps: int = 0,
    profile_steps: range | None = None,
    step: StepChoice | Capture = "auto",
    world: World = ALONE,
) -> TrainingHistory:
    """Train ``model``, called as ``model(batch: FeatureBatch) -> logits [B, outputs]``.

    ``outputs`` is ``num_classes``, or 1 for a regression loss.  ``class_counts`` (training images
    per class) are for balanced loss weights, ``class_names`` for the log, ``extra`` for
    ``model.save_pretrained``.  ``inputs``: JSON values of what else shapes the run (model,
    features, images, augmentation), which must be the same for it to be resumed.

    After each epoch ``run_dir/last`` is replaced, and ``run_dir/best`` where
    ``config.monitor`` of the validation images became better: the first finite value is better
    than none, NaN never is, and of equal ones the earlier stays.  Without a finite one ``best``
    holds the last epoch, and so does the model: ``load_weights(model, run_dir / "best")``.

    SIGTERM or Ctrl-C replaces ``run_dir/last`` by the state after the step under way, and so does
    every ``checkpoint_steps``-th step (0: none); after a kill, the last of these counts.
    ``resume`` goes on from there, if there is anything; on a CPU the result equals that of an
    uninterrupted run bit for bit (with as many threads).  ``profile_steps``: steps of this call
    that are bracketed by cudaProfilerStart and Stop.  ``step``: ``"graph"`` launches each step as
    one CUDA graph, ``"eager"`` operation by operation, ``"auto"`` chooses and says why (a
    ``Capture`` of one's own captures with that).  Dropout is seeded by ``config.seed``; the
    caller's random state is left as it was.

    The ranks of ``world`` call this together: each computes its rows of every batch, and the
    result is that of one process within rounding (see ``ranks``).  Rank 0 alone uses ``run_dir``.

    Raises ``ConfigError`` for settings that cannot work, ``CheckpointError`` where ``run_dir``
    holds a run that is not to be or cannot be resumed, ``ValueError`` for labels or logits that do
    not fit, ``Stopped`` after Ctrl-C or SIGTERM, and ``TrainingError`` for a loss that is not
    finite, naming epoch and step.
    """
    target = resolve_device(device)
    capture, why = choose_capture(step, target, world.size)
    _check_setup(train_batches, config, num_classes, checkpoint_steps)
    parameters = _trainable(model.to(target))
    run = Run(
        model=model,
        parameters=parameters,
        loss=build_loss(config, class_counts, num_classes=num_classes).to(target),
        optimizer=build_optimizer(parameters, config, target, static=capture is not None),
        train_batches=train_batches,
        val_batches=None if val_batches is None or len(val_batches) == 0 else val_batches,
        config=config,
        num_classes=num_classes,
        class_names=class_names,
        identity={
            **_identity(train_batches, val_batches, config, num_classes, class_counts),
            "inputs": json.loads(json.dumps(dict(inputs or {}))),
        },
        run_dir=Path(run_dir),
        device=target,
        extra=extra,
        checkpoint_steps=checkpoint_steps,
        profiler=StepProfiler(profile_steps),
        world=world,
        records=[],
    )
    history = _train(run, resume, (capture, why, step == "graph"), callbacks, progress)
    for callback in callbacks:
        callback.on_end(history)
    return history


def _train(
    run: Run,
    resume: bool,
    step: tuple[Capture | None, str, bool],
    callbacks: Sequence[Callback],
    progress: bool,
) -> TrainingHistory:
    """All epochs that are left, with random numbers of the run's own; ``step``: how each is
    captured, why, and whether it must be."""
    world, (capture, why, required) = run.world, step
    keep_freed_memory(run.device)
    world.require_same(json.dumps(run.identity, sort_keys=True), "settings")
    with (
        torch.random.fork_rng(devices=_cuda_devices(run.device, world)),
        run.dropout.taken_by(run.model, world),
    ):
        torch.manual_seed(run.config.seed)
        _set_step(run, resume_run(run, resume), capture, required=required)
        require_same_weights(run.model, "before the first step", world)
        LOGGER.info("step: %s, since %s", "eager" if capture is None else "graph", why)
        _run_epochs(run, callbacks, progress)
        return _finish(run)


def _set_step(
    run: Run, state: Mapping[str, Any], capture: Capture | None, *, required: bool
) -> None:
    """How ``run`` makes its steps, over its restored optimiser, from ``state`` on."""
    run.train_step = (
        OrdinaryStep(run) if capture is None else StaticStep(run, capture, required=required)
    )
    run.train_step.restore(state)


def _run_epochs(run: Run, callbacks: Sequence[Callback], progress: bool) -> None:
    steps, finished = len(run.train_batches), len(run.records)
    done = steps * finished + (0 if run.begun is None else len(run.begun.losses))
    total = steps * run.config.epochs
    with (
        stop_on_signals() as run.stop,
        run.profiler,
        open_progress("train", total, enabled=progress and run.world.is_first, done=done) as bar,
    ):
        for epoch in range(finished, run.config.epochs):
            record = run_epoch(run, epoch, bar)
            bar.message(_describe(run, record))
            for callback in callbacks:
                callback.on_epoch_end(record)


def _check_setup(
    train_batches: EpochBatches, config: TrainConfig, num_classes: int, checkpoint_steps: int
) -> None:
    """Raise ``ConfigError`` for what can be known to fail before the first step."""
    if checkpoint_steps < 0:
        raise ConfigError(f"checkpoint_steps must be at least 0, got {checkpoint_steps}")
    check_schedule(config)
    check_monitor(config)
    if num_classes < (1 if config.has_findings or config.target is not None else 2):
        raise ConfigError(
            f"training needs at least two classes, got {num_classes}; is the data's folder "
            "one level too deep?"
        )
    if len(train_batches) == 0:
        raise ConfigError("training needs at least one batch, got none: is the split empty?")


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise ConfigError("the model has no parameter that requires a gradient, so none to train")
    return parameters


def _identity(
    train_batches: EpochBatches,
    val_batches: EpochBatches | None,
    config: TrainConfig,
    num_classes: int,
    class_counts: Sequence[int] | None,
) -> dict[str, Any]:
    """What must be the same for a run to be resumed, as JSON values."""
    return {
        "config": config.to_json(),
        "num_classes": num_classes,
        "class_counts": None if class_counts is None else list(class_counts),
        "train_batches": len(train_batches),
        "val_batches": 0 if val_batches is None else len(val_batches),
    }


def _cuda_devices(device: torch.device, world: World) -> list[int]:
    if device.type != "cuda":
        return []
    # The other GPUs are other ranks'.
    one = world.size > 1
    return [torch.cuda.current_device()] if one else list(range(torch.cuda.device_count()))


def _finish(run: Run) -> TrainingHistory:
    """Make sure that ``best`` exists, and sum up."""
    if run.val_batches is None:
        LOGGER.warning("no validation images: the last epoch counts as the best")
        run.best_epoch = run.config.epochs - 1
        _save_last_as_best(run)
    elif run.best_epoch is None:
        LOGGER.warning(
            "%s of the validation images was never a finite number: `best` holds the last epoch",
            run.config.monitor,
        )
        _save_last_as_best(run)
    # All of it is on disk where this returns, on whichever rank.
    run.world.meet("at the end of training")
    return TrainingHistory(tuple(run.records), run.config.monitor, run.best_epoch, run.best_value)


def _save_last_as_best(run: Run) -> None:
    if run.world.is_first:
        save_best(run.run_dir, run.model, run.extra)


def _describe(run: Run, record: EpochRecord) -> str:
    """One line on an epoch, for people (who count from 1)."""
    parts = [f"epoch {record.epoch + 1}/{run.config.epochs}", f"loss {record.loss:.4f}"]
    if run.config.monitor in record.val:
        name = run.config.monitor
        parts.append(f"val {spoken(name)} {record.val[name]:.4f}")
    if run.best_epoch is not None and run.best_value is not None:
        parts.append(f"best {run.best_value:.4f} (epoch {run.best_epoch + 1})")
    parts.append(f"took {format_seconds(record.seconds)}")
    return ", ".join(parts)
