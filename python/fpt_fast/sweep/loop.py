"""The sweep's loop: many trials on one stream of features, each as if trained alone."""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fpt_fast.config import ConfigError, TrainConfig
from fpt_fast.interrupts import StopRequest, stop_on_signals
from fpt_fast.losses import EpochLoss, build_loss
from fpt_fast.metrics import LOWER_IS_BETTER, compute_metrics, spoken
from fpt_fast.model import FptModel
from fpt_fast.records import EpochRecord, Predictions, SweepBatch, TrainingHistory
from fpt_fast.sweep.checkpoint import load_sweep, save_sweep
from fpt_fast.sweep.group import (
    TrialGroup,
    TrialState,
    backward,
    losses_of,
)
from fpt_fast.sweep.prediction import attend_all, forward_all
from fpt_fast.sweep.trials import Trial, distinct_seeds
from fpt_fast.trainer import learning_rate_at, monitor_names, resolve_device
from fpt_fast.trainer.arithmetic import Arithmetic
from fpt_fast.trainer.batches import check_labels, move_batch
from fpt_fast.trainer.memory import keep_freed_memory
from fpt_fast.trainer.prediction import in_units, probabilities_of
from fpt_fast.trainer.progress import Progress, format_seconds, open_progress
from fpt_fast.trainer.validation import is_better, validation_loss

LOGGER = logging.getLogger("fpt_fast")


class SweepBatches(Protocol):
    """Batches of one split for several models; as ``trainer.EpochBatches``, but of SweepBatch."""

    def __iter__(self) -> Iterator[SweepBatch]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...


@dataclass(frozen=True, slots=True)
class TrialOutcome:
    """A trial after the sweep: how it went, and the weights of its best epoch by name.

    ``best`` is None where no epoch had a finite loss; ``ended`` says why the trial was ended
    before its last epoch, None where it was not.
    """

    trial: Trial
    history: TrainingHistory
    best: dict[str, Tensor] | None
    ended: str | None


@dataclass(slots=True)
class _Sweep:
    """A sweep under way."""

    groups: list[TrialGroup]
    states: list[TrialState]
    recipe: TrainConfig
    losses: EpochLoss
    train_batches: SweepBatches
    val_batches: SweepBatches | None
    num_classes: int
    device: torch.device
    arithmetic: Arithmetic
    row_of_seed: dict[int, int]
    halve_every: int | None
    identity: dict[str, Any]
    path: Path
    epoch: int = 0
    stop: StopRequest = field(default_factory=StopRequest)


def fit_sweep(
    models: Sequence[FptModel],
    trials: Sequence[Trial],
    train_batches: SweepBatches,
    val_batches: SweepBatches | None,
    *,
    path: Path,
    num_classes: int,
    class_counts: Sequence[int] | None = None,
    device: str | torch.device = "auto",
    halve_every: int | None = None,
    resume: bool = False,
    progress: bool = True,
    inputs: dict[str, Any] | None = None,
) -> tuple[TrialOutcome, ...]:
    """Train ``models``, one a trial, side by side; each ends as if trained alone, up to rounding.

    All read one stream of features in one order; a ``SweepBatch`` has one side input for each
    distinct seed, in the order of the trials.  ``halve_every``: after so many epochs, and again
    after as many, the worse half by the monitored metric stops.  A trial whose loss is not
    finite ends alone.  After each epoch ``path`` is replaced by a checkpoint, from which
    ``resume`` goes on.  ``inputs``: JSON values of what else must be the same to resume.

    Returns the outcomes in the order of ``trials``.  Raises ``ConfigError`` for recipes that
    differ in more than learning rate, weight decay and seed, for products in float16, or for
    halving without validation images; ``CheckpointError`` for a checkpoint of another sweep;
    ``Stopped`` on a signal.
    """
    target = resolve_device(device)
    keep_freed_memory(target)
    recipe = trials[0].recipe
    _check(trials, val_batches, halve_every)
    groups = _group(models, trials, target)
    by_trial = {state.trial.name: state for group in groups for state in group.states}
    sweep = _Sweep(
        groups=groups,
        states=[by_trial[trial.name] for trial in trials],
        recipe=recipe,
        losses=build_loss(recipe, class_counts, num_classes=num_classes).to(target),
        train_batches=train_batches,
        val_batches=None if val_batches is None or len(val_batches) == 0 else val_batches,
        num_classes=num_classes,
        device=target,
        arithmetic=Arithmetic(recipe.precision, target),
        row_of_seed={seed: row for row, seed in enumerate(distinct_seeds(trials))},
        halve_every=halve_every,
        identity={
            "trials": [[t.name, t.method.to_json(), t.recipe.to_json()] for t in trials],
            "halve_every": halve_every,
            "inputs": inputs or {},
        },
        path=path,
    )
    if resume:
        sweep.epoch = load_sweep(path, sweep.identity, sweep.groups, sweep.states)
    with stop_on_signals() as sweep.stop, _progress(sweep, progress) as bar:
        while sweep.epoch < recipe.epochs and sweep.groups:
            _run_epoch(sweep, bar)
            save_sweep(path, sweep.identity, sweep.epoch, sweep.groups, sweep.states)
    return tuple(_outcome(sweep, state) for state in sweep.states)


def _check(
    trials: Sequence[Trial], val_batches: SweepBatches | None, halve_every: int | None
) -> None:
    names = [trial.name for trial in trials]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"trials must be at least one, each with its own name, got {names}")
    own = ("learning_rate", "weight_decay", "seed")
    shared = [
        {key: value for key, value in trial.recipe.to_json().items() if key not in own}
        for trial in trials
    ]
    if any(other != shared[0] for other in shared):
        raise ConfigError(f"trials of one sweep may differ in {', '.join(own)} and prompts only")
    recipe = trials[0].recipe
    if recipe.precision == "float16":
        raise ConfigError(
            "precision of a sweep must be float32 or bfloat16, got float16, in which each model "
            "would need a scale of its own for its loss; use bfloat16, or train one by one"
        )
    if recipe.monitor not in monitor_names(recipe):
        raise ConfigError(
            f"monitor must be one of {', '.join(monitor_names(recipe))}, got {recipe.monitor!r}"
        )
    if halve_every is not None and (halve_every < 1 or not val_batches):
        raise ConfigError(
            "halving needs validation images and at least 1 epoch between halvings, got "
            f"{halve_every} and {'no ' if not val_batches else ''}validation images"
        )


def _group(
    models: Sequence[FptModel], trials: Sequence[Trial], device: torch.device
) -> list[TrialGroup]:
    """Trials of equal configuration together, in order of appearance."""
    rows: dict[str, list[int]] = {}
    for row, model in enumerate(models):
        rows.setdefault(repr(model.config), []).append(row)
    return [
        TrialGroup([models[row] for row in of], [trials[row] for row in of], device)
        for of in rows.values()
    ]


def _progress(sweep: _Sweep, enabled: bool) -> AbstractContextManager[Progress]:
    steps = len(sweep.train_batches)
    total, done = steps * sweep.recipe.epochs, steps * sweep.epoch
    bar: AbstractContextManager[Progress] = open_progress(
        "sweep", total, enabled=enabled, done=done
    )
    return bar


def _run_epoch(sweep: _Sweep, bar: Progress) -> None:
    """Train one epoch, end what has failed, validate, keep the best, and halve."""
    start, epoch = time.monotonic(), sweep.epoch
    live = [state for group in sweep.groups for state in group.states]
    losses = _train_epoch(sweep, bar)
    last = epoch + 1 == sweep.recipe.epochs
    due = sweep.val_batches is not None and (last or (epoch + 1) % sweep.recipe.eval_interval == 0)
    val = _validate(sweep) if due else [{} for _ in live]
    for state, loss, metrics in zip(live, losses, val, strict=True):
        steps = len(sweep.train_batches)
        rate = learning_rate_at(epoch + (steps - 1) / steps, state.trial.recipe)
        state.records.append(
            EpochRecord(epoch, loss, rate, time.monotonic() - start, metrics if due else {})
        )
    _keep_best(sweep)
    _end_failed(sweep)
    if sweep.halve_every and (epoch + 1) % sweep.halve_every == 0 and not last:
        _halve(sweep)
    sweep.epoch += 1
    bar.message(_describe(sweep, time.monotonic() - start))


def _train_epoch(sweep: _Sweep, bar: Progress) -> list[float]:
    """One pass over the training batches; mean loss of each live trial, group by group."""
    steps = len(sweep.train_batches)
    count = sum(len(group) for group in sweep.groups)
    losses = torch.zeros((steps, count), device=sweep.device)
    sizes = torch.zeros(steps, dtype=torch.float64)
    sweep.losses.set_epoch(sweep.epoch)
    sweep.train_batches.set_epoch(sweep.epoch)
    for step, batch in enumerate(sweep.train_batches):
        if sweep.epoch == 0:
            check_labels(batch.shared, sweep.num_classes)
        losses[step] = _train_step(sweep, batch, sweep.epoch + step / steps)
        sizes[step] = len(batch.shared.keys)
        sweep.stop.check(f"{sweep.epoch} epochs are in {sweep.path}; resume to go on from there")
        bar.advance()
    weighted = (losses.double().cpu() * sizes[:, None]).sum(0) / sizes.sum()
    means: list[float] = weighted.tolist()
    return means


def _train_step(sweep: _Sweep, batch: SweepBatch, epoch: float) -> Tensor:
    """One step of every trial; returns their losses [trials], still on the device."""
    shared = move_batch(batch.shared, sweep.device)
    pixels = batch.side_pixels.to(sweep.device, non_blocking=True)
    stacks = [group.stack for group in sweep.groups]
    with sweep.arithmetic.forward():
        logits = []
        for group, attended in zip(sweep.groups, attend_all(stacks, shared), strict=True):
            rows = [sweep.row_of_seed[state.trial.recipe.seed] for state in group.states]
            logits.append(group.logits(pixels[rows], attended, training=True))
    losses = [losses_of(sweep.losses, of_group, shared.labels) for of_group in logits]
    # Groups share the features but no weight: the gradient of the sum is each one's own.
    total = torch.cat(losses)
    backward(sweep.groups, total.sum())
    for group in sweep.groups:
        group.step(epoch)
    return total.detach()


def _validate(sweep: _Sweep) -> list[dict[str, float]]:
    """Metrics of the validation images for each live trial, group by group."""
    assert sweep.val_batches is not None
    stacks = [group.stack for group in sweep.groups]
    logits, keys, labels = forward_all(stacks, sweep.val_batches, sweep.device)
    return [_metrics_of(sweep, keys, labels, row) for part in logits for row in part]


def _metrics_of(
    sweep: _Sweep, keys: tuple[str, ...], labels: Tensor, logits: Tensor
) -> dict[str, float]:
    if not bool(logits.isfinite().all()):
        return {}
    probabilities = None if sweep.recipe.is_regression else probabilities_of(logits, labels)
    predictions = in_units(Predictions(keys, labels, logits, probabilities), sweep.recipe.target)
    loss = validation_loss(predictions, sweep.recipe)
    return {"loss": loss, **compute_metrics(predictions, sweep.num_classes).values}


def _keep_best(sweep: _Sweep) -> None:
    for group in sweep.groups:
        for row, state in enumerate(group.states):
            record, monitor = state.records[-1], sweep.recipe.monitor
            value = record.val.get(monitor, math.nan)
            if is_better(value, state.best_value, monitor):
                state.best_epoch, state.best_value = record.epoch, value
            elif state.best_value is not None or not math.isfinite(record.loss):
                continue
            # Without a finite value so far, the last epoch stands in for the best.
            state.best_weights = group.stack.weights[row].detach().clone()


def _end_failed(sweep: _Sweep) -> None:
    for state in (state for group in sweep.groups for state in group.states):
        if not math.isfinite(state.records[-1].loss):
            state.ended = (
                f"its loss became {state.records[-1].loss} in epoch {sweep.epoch + 1}; try a "
                f"learning rate below {state.trial.recipe.learning_rate}"
            )
            LOGGER.warning("sweep: %s ended: %s", state.trial.name, state.ended)
    _drop_ended(sweep)


def _halve(sweep: _Sweep) -> None:
    """End the worse half of the live trials by their best value so far."""
    live = [state for group in sweep.groups for state in group.states]
    sign = 1.0 if sweep.recipe.monitor in LOWER_IS_BETTER else -1.0

    def rank(state: TrialState) -> float:
        return math.inf if state.best_value is None else sign * state.best_value

    for state in sorted(live, key=rank)[-(-len(live) // 2) :]:
        state.ended = f"it was in the worse half after epoch {sweep.epoch + 1}"
    _drop_ended(sweep)


def _drop_ended(sweep: _Sweep) -> None:
    for group in sweep.groups:
        rows = [row for row, state in enumerate(group.states) if state.ended is None]
        if len(rows) < len(group):
            group.keep(rows)
    sweep.groups = [group for group in sweep.groups if len(group)]


def _describe(sweep: _Sweep, seconds: float) -> str:
    live = sum(len(group) for group in sweep.groups)
    parts = [f"epoch {sweep.epoch}/{sweep.recipe.epochs}", f"{live} models"]
    known = [state for state in sweep.states if state.best_value is not None]
    if known:
        sign = 1.0 if sweep.recipe.monitor in LOWER_IS_BETTER else -1.0
        best = min(known, key=lambda state: sign * (state.best_value or 0.0))
        name = spoken(sweep.recipe.monitor)
        parts.append(f"best val {name} {best.best_value:.4f} ({best.trial.name})")
    return ", ".join([*parts, f"took {format_seconds(seconds)}"])


def _outcome(sweep: _Sweep, state: TrialState) -> TrialOutcome:
    best_epoch = state.best_epoch
    if sweep.val_batches is None and state.records:
        best_epoch = state.records[-1].epoch
    history = TrainingHistory(
        tuple(state.records), sweep.recipe.monitor, best_epoch, state.best_value
    )
    best = None if state.best_weights is None else state.stack.state_dict(state.best_weights.cpu())
    return TrialOutcome(state.trial, history, best, state.ended)
