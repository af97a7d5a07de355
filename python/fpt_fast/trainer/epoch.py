"""One epoch of training: its steps, what is checked of them, and where they may be interrupted."""

import math
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from fpt_fast.config import TrainConfig
from fpt_fast.profiling import span
from fpt_fast.records import EpochRecord, FeatureBatch
from fpt_fast.trainer.batches import (
    EpochBatches,
    batches_from,
    check_labels,
    check_logits,
    move_batch,
)
from fpt_fast.trainer.checkpoint import save_best
from fpt_fast.trainer.progress import Progress
from fpt_fast.trainer.run import Run, leave_if_asked, save_run
from fpt_fast.trainer.schedule import learning_rate_at
from fpt_fast.trainer.state import BegunEpoch
from fpt_fast.trainer.validation import is_better, validate

# Reading a loss waits for the device; once in so many steps costs nothing.
_STEPS_BETWEEN_CHECKS = 64


class TrainingError(RuntimeError):
    """Training cannot go on; says where it stopped and what to try."""


def run_epoch(run: Run, epoch: int, bar: Progress) -> EpochRecord:
    """Train and validate one epoch and write its checkpoints."""
    trained = _train_epoch(run, epoch, bar)
    due = (epoch + 1) % run.config.eval_interval == 0 or epoch + 1 == run.config.epochs
    start = time.monotonic()
    val: dict[str, float] = {}
    if due and run.val_batches is not None:
        val = validate(
            run.model,
            _interruptible(run.val_batches, run, trained),
            run.config,
            run.num_classes,
            run.device,
            explain=epoch == 0,
        )
    sizes = torch.tensor(trained.sizes, dtype=torch.float64)
    losses = torch.tensor(trained.losses, dtype=torch.float64)
    record = EpochRecord(
        epoch,
        float((losses * sizes).sum() / sizes.sum()),
        _learning_rate(run, epoch, len(trained.losses) - 1),
        trained.seconds + time.monotonic() - start,
        val,
    )
    run.records.append(record)
    value = val.get(run.config.monitor, math.nan)
    # Before last: a kill between the two repeats this epoch's end, and so writes best again.
    if is_better(value, run.best_value, run.config.monitor):
        run.best_epoch, run.best_value = epoch, value
        save_best(run.run_dir, run.model, run.extra)
    save_run(run)
    return record


def _interruptible(batches: EpochBatches, run: Run, trained: BegunEpoch) -> Iterator[FeatureBatch]:
    for batch in batches:
        yield batch
        leave_if_asked(run, trained)


def _train_epoch(run: Run, epoch: int, bar: Progress) -> BegunEpoch:
    """One pass over the training batches, or the rest of it where the run was put down in one."""
    steps = len(run.train_batches)
    begun, run.begun = run.begun or BegunEpoch(epoch, [], [], 0.0), None
    losses = torch.zeros(steps, device=run.device)
    losses[: len(begun.losses)] = torch.tensor(begun.losses)
    sizes = list(begun.sizes)
    first = checked = len(sizes)
    start, detail = time.monotonic() - begun.seconds, ""

    def so_far() -> BegunEpoch:
        """What was done up to here; its losses are finite."""
        values = losses[: len(sizes)].tolist()
        _check_losses(values[checked:], epoch, checked, run.config)
        return BegunEpoch(epoch, values, list(sizes), time.monotonic() - start)

    run.model.train()
    run.loss.set_epoch(epoch)
    run.train_batches.set_epoch(epoch)
    for step, batch in enumerate(batches_from(run.train_batches, first), first):
        if step == steps:
            break
        with run.profiler.step():
            losses[step] = _train_step(run, batch, _learning_rate(run, epoch, step))
        sizes.append(len(batch.keys))
        if run.stop.requested:
            leave_if_asked(run, so_far())
        if step + 1 - checked == _STEPS_BETWEEN_CHECKS or step + 1 == steps:
            mean = _check_losses(losses[checked : step + 1].tolist(), epoch, checked, run.config)
            checked, detail = step + 1, f"epoch {epoch + 1}, loss {mean:.4f}"
        if run.checkpoint_steps and (epoch * steps + step + 1) % run.checkpoint_steps == 0:
            save_run(run, so_far())
        bar.advance(detail)
    if len(sizes) != steps:
        raise TrainingError(
            f"train_batches must yield {steps} batches, its length, got {len(sizes)} in epoch "
            f"{epoch}: the learning-rate schedule counts on it"
        )
    run.labels_checked = True
    return so_far()


def _learning_rate(run: Run, epoch: int, step: int) -> float:
    return learning_rate_at(epoch + step / len(run.train_batches), run.config)


def _train_step(run: Run, batch: FeatureBatch, learning_rate: float) -> Tensor:
    """Forward, backward and one step of the optimiser; returns the loss, still on the device."""
    # Labels on an accelerator are looked at in the first epoch only: looking waits for it.
    if batch.labels.device.type == "cpu" or not run.labels_checked:
        check_labels(batch, run.num_classes)
    batch = move_batch(batch, run.device)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.zero_grad(set_to_none=True)
    logits: Tensor = run.model(batch).float()
    outputs = 1 if run.config.is_regression else run.num_classes
    check_logits(logits, len(batch.keys), outputs)
    loss: Tensor = run.loss(logits, batch.labels)
    with span("backward"):
        loss.backward()  # type: ignore[no-untyped-call]
    with span("optimiser"):
        nn.utils.clip_grad_norm_(run.parameters, run.config.clip_norm)
        run.optimizer.step()
    return loss.detach()


def _check_losses(
    values: Sequence[float], epoch: int, first_step: int, config: TrainConfig
) -> float:
    """Mean of some steps' losses; ``TrainingError`` naming the first that is not finite."""
    for offset, value in enumerate(values):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} in epoch {epoch}, step {first_step + offset} (both from "
                f"0); try a learning_rate below {config.learning_rate}, warmup_epochs, or check "
                "the features with `fpt-fast cache verify`"
            )
    return math.fsum(values) / max(1, len(values))
