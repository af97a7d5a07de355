"""The training loop: the published recipe, resumable, bit for bit the same for one seed."""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fpt_fast.config import ConfigError, TrainConfig
from fpt_fast.interrupts import StopRequest, stop_on_signals
from fpt_fast.losses import EpochLoss, build_loss
from fpt_fast.profiling import span
from fpt_fast.records import EpochRecord, FeatureBatch, TrainingHistory
from fpt_fast.trainer.batches import (
    EpochBatches,
    check_labels,
    check_logits,
    move_batch,
    resolve_device,
)
from fpt_fast.trainer.checkpoint import (
    Checkpoint,
    CheckpointError,
    cpu_state,
    load_last,
    load_state,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
    save_best,
    save_last,
)
from fpt_fast.trainer.progress import Progress, format_seconds, open_progress
from fpt_fast.trainer.schedule import build_optimizer, check_schedule, learning_rate_at
from fpt_fast.trainer.state import describe_difference, record_from_json, record_to_json
from fpt_fast.trainer.validation import check_monitor, is_better, validate

LOGGER = logging.getLogger("fpt_fast")

# Reading a loss waits for the device; once in so many steps costs nothing.
_STEPS_BETWEEN_CHECKS = 64


class TrainingError(RuntimeError):
    """Training cannot go on; says where it stopped and what to try."""


class Callback(Protocol):
    """Told of each epoch that this call of ``fit`` trained, and of the whole at the end."""

    def on_epoch_end(self, record: EpochRecord) -> None:
        """An epoch ended, and its checkpoint is written."""

    def on_end(self, history: TrainingHistory) -> None:
        """Training ended."""


@dataclass(slots=True)
class _Run:
    """A run under way: what does not change, then what each epoch changes."""

    model: nn.Module
    parameters: list[nn.Parameter]
    loss: EpochLoss
    optimizer: torch.optim.Optimizer
    train_batches: EpochBatches
    val_batches: EpochBatches | None
    config: TrainConfig
    num_classes: int
    identity: dict[str, Any]
    run_dir: Path
    device: torch.device
    extra: Mapping[str, Any] | None
    records: list[EpochRecord]
    best_epoch: int | None = None
    best_value: float | None = None
    labels_checked: bool = False
    stop: StopRequest = field(default_factory=StopRequest)


def fit(
    model: nn.Module,
    train_batches: EpochBatches,
    val_batches: EpochBatches | None,
    config: TrainConfig,
    *,
    run_dir: str | Path,
    num_classes: int,
    class_counts: Sequence[int] | None = None,
    device: str | torch.device = "auto",
    resume: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    extra: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> TrainingHistory:
    """Train ``model``, called as ``model(batch: FeatureBatch) -> logits [B, outputs]``.

    ``outputs`` is ``num_classes``, or 1 for a regression loss.  ``class_counts`` (training images
    per class) are needed for balanced loss weights.  ``extra`` goes to ``model.save_pretrained``.
    ``inputs``: JSON values of what else shapes the run (model, features, images, augmentation),
    which must be the same for it to be resumed.

    After each epoch ``run_dir/last`` is replaced, and ``run_dir/best`` where
    ``config.monitor`` of the validation images became better: the first finite value is better
    than none, NaN never is, and of equal ones the earlier stays.  If no epoch has a finite value,
    or without validation images, ``best`` holds the last epoch.  At return the model holds the last
    epoch's weights; ``load_weights(model, run_dir / "best")`` fetches the best.

    ``resume`` goes on after the last finished epoch of ``run_dir``, if there is one; the result
    equals that of an uninterrupted run bit for bit.  Dropout is seeded by ``config.seed``; the
    caller's random state is left as it was.

    Raises ``ConfigError`` for settings that cannot work, ``CheckpointError`` where ``run_dir``
    holds a run that is not to be or cannot be resumed, ``ValueError`` for labels or logits that do
    not fit, ``Stopped`` after Ctrl-C or SIGTERM, and ``TrainingError`` for a loss that is not
    finite, naming epoch and step.
    """
    target = resolve_device(device)
    _check_setup(train_batches, config, num_classes)
    parameters = _trainable(model.to(target))
    run = _Run(
        model=model,
        parameters=parameters,
        loss=build_loss(config, class_counts, num_classes=num_classes).to(target),
        optimizer=build_optimizer(parameters, config, target),
        train_batches=train_batches,
        val_batches=None if val_batches is None or len(val_batches) == 0 else val_batches,
        config=config,
        num_classes=num_classes,
        identity={
            **_identity(train_batches, val_batches, config, num_classes, class_counts),
            "inputs": json.loads(json.dumps(dict(inputs or {}))),
        },
        run_dir=Path(run_dir),
        device=target,
        extra=extra,
        records=[],
    )
    steps = len(train_batches)
    with torch.random.fork_rng(devices=_cuda_devices(target)):
        torch.manual_seed(config.seed)
        _resume_run(run, resume)
        done = len(run.records)
        with (
            stop_on_signals() as run.stop,
            open_progress(
                "train", steps * config.epochs, enabled=progress, done=steps * done
            ) as bar,
        ):
            for epoch in range(done, config.epochs):
                record = _run_epoch(run, epoch, bar)
                bar.message(_describe(run, record))
                for callback in callbacks:
                    callback.on_epoch_end(record)
        history = _finish(run)
    for callback in callbacks:
        callback.on_end(history)
    return history


def _check_setup(train_batches: EpochBatches, config: TrainConfig, num_classes: int) -> None:
    """Raise ``ConfigError`` for what can be known to fail before the first step."""
    check_schedule(config)
    check_monitor(config)
    if num_classes < 2:
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


def _cuda_devices(device: torch.device) -> list[int]:
    return list(range(torch.cuda.device_count())) if device.type == "cuda" else []


def _resume_run(run: _Run, resume: bool) -> None:
    """Take up the state of ``last``, or make sure that there is none to overwrite."""
    checkpoint = load_last(run.run_dir)
    if checkpoint is None:
        return
    if not resume:
        raise CheckpointError(
            f"{run.run_dir} holds a run already; pass resume=True to go on with it, or choose "
            "another run_dir"
        )
    state = checkpoint.state
    difference = describe_difference(state["identity"], run.identity)
    if difference:
        raise CheckpointError(
            f"the run in {run.run_dir} was started with other settings, so it cannot be resumed: "
            f"{difference}; restore them or choose another run_dir"
        )
    load_state(run.model, checkpoint.model, str(run.run_dir / "last"))
    restore_optimizer(run.optimizer, checkpoint.optimizer)
    restore_random_state(state["random"], run.device)
    run.records = [record_from_json(record) for record in state["records"]]
    run.best_epoch, run.best_value = state["best_epoch"], state["best_value"]
    LOGGER.info("resuming %s after epoch %d", run.run_dir, len(run.records))


def _run_epoch(run: _Run, epoch: int, bar: Progress) -> EpochRecord:
    """Train and validate one epoch and write its checkpoints."""
    start = time.monotonic()
    loss, learning_rate = _train_epoch(run, epoch, bar)
    due = (epoch + 1) % run.config.eval_interval == 0 or epoch + 1 == run.config.epochs
    val: dict[str, float] = {}
    if due and run.val_batches is not None:
        val = validate(
            run.model,
            run.val_batches,
            run.config,
            run.num_classes,
            run.device,
            explain=epoch == 0,
        )
    record = EpochRecord(epoch, loss, learning_rate, time.monotonic() - start, val)
    run.records.append(record)
    value = val.get(run.config.monitor, math.nan)
    # Before last: a kill between the two repeats this epoch, and so writes best again.
    if is_better(value, run.best_value, run.config.monitor):
        run.best_epoch, run.best_value = epoch, value
        save_best(run.run_dir, run.model, run.extra)
    state = {
        "identity": run.identity,
        "records": [record_to_json(record) for record in run.records],
        "best_epoch": run.best_epoch,
        "best_value": run.best_value,
        "random": random_state(run.device),
    }
    save_last(
        run.run_dir, Checkpoint(cpu_state(run.model), optimizer_tensors(run.optimizer), state)
    )
    return record


def _train_epoch(run: _Run, epoch: int, bar: Progress) -> tuple[float, float]:
    """One pass over the training batches; returns the mean loss and the last learning rate."""
    steps = len(run.train_batches)
    losses = torch.zeros(steps, device=run.device)
    sizes: list[int] = []
    learning_rate, checked, detail = 0.0, 0, ""
    run.model.train()
    run.loss.set_epoch(epoch)
    run.train_batches.set_epoch(epoch)
    for step, batch in enumerate(run.train_batches):
        if step == steps:
            break
        learning_rate = learning_rate_at(epoch + step / steps, run.config)
        losses[step] = _train_step(run, batch, learning_rate)
        sizes.append(len(batch.keys))
        run.stop.check(
            f"{epoch} of {run.config.epochs} epochs are in {run.run_dir / 'last'}; "
            "resume the run to go on from there"
        )
        if step + 1 - checked == _STEPS_BETWEEN_CHECKS or step + 1 == steps:
            mean = _check_losses(losses[checked : step + 1], epoch, checked, run.config)
            checked, detail = step + 1, f"epoch {epoch + 1}, loss {mean:.4f}"
        bar.advance(detail)
    if len(sizes) != steps:
        raise TrainingError(
            f"train_batches must yield {steps} batches, its length, got {len(sizes)} in epoch "
            f"{epoch}: the learning-rate schedule counts on it"
        )
    run.labels_checked = True
    weights = torch.tensor(sizes, dtype=torch.float64)
    return float((losses.double().cpu() * weights).sum() / weights.sum()), learning_rate


def _train_step(run: _Run, batch: FeatureBatch, learning_rate: float) -> Tensor:
    """Forward, backward and one step of the optimiser; returns the loss, still on the device."""
    # Labels on an accelerator are looked at in the first epoch only: looking waits for it.
    if batch.labels.device.type == "cpu" or not run.labels_checked:
        check_labels(batch, run.num_classes)
    batch = move_batch(batch, run.device)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.zero_grad(set_to_none=True)
    with span("side.fwd"):
        logits: Tensor = run.model(batch).float()
    outputs = 1 if run.config.is_regression else run.num_classes
    check_logits(logits, len(batch.keys), outputs)
    loss: Tensor = run.loss(logits, batch.labels)
    with span("side.bwd"):
        loss.backward()  # type: ignore[no-untyped-call]
    parameters = [
        parameter for group in run.optimizer.param_groups for parameter in group["params"]
    ]
    with span("opt"):
        nn.utils.clip_grad_norm_(parameters, run.config.clip_norm)
        run.optimizer.step()
    return loss.detach()


def _check_losses(losses: Tensor, epoch: int, first_step: int, config: TrainConfig) -> float:
    """Mean of some steps' losses; ``TrainingError`` naming the first that is not finite."""
    values = losses.tolist()
    for offset, value in enumerate(values):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} in epoch {epoch}, step {first_step + offset} (both from "
                f"0); try a learning_rate below {config.learning_rate}, warmup_epochs, or check "
                "the features with `fpt-fast cache verify`"
            )
    return math.fsum(values) / len(values)


def _finish(run: _Run) -> TrainingHistory:
    """Make sure that ``best`` exists, and sum up."""
    if run.val_batches is None:
        LOGGER.warning("no validation images: the last epoch counts as the best")
        run.best_epoch = run.config.epochs - 1
        save_best(run.run_dir, run.model, run.extra)
    elif run.best_epoch is None:
        LOGGER.warning(
            "%s of the validation images was never a finite number: `best` holds the last epoch",
            run.config.monitor,
        )
        save_best(run.run_dir, run.model, run.extra)
    return TrainingHistory(tuple(run.records), run.config.monitor, run.best_epoch, run.best_value)


def _describe(run: _Run, record: EpochRecord) -> str:
    """One line on an epoch, for people (who count from 1)."""
    parts = [f"epoch {record.epoch + 1}/{run.config.epochs}", f"loss {record.loss:.4f}"]
    if run.config.monitor in record.val:
        parts.append(f"val {run.config.monitor} {record.val[run.config.monitor]:.4f}")
    if run.best_epoch is not None and run.best_value is not None:
        parts.append(f"best {run.best_value:.4f} (epoch {run.best_epoch + 1})")
    parts.append(f"took {format_seconds(record.seconds)}")
    return ", ".join(parts)
