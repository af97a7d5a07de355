"""One epoch of training: its steps, what is checked of them, and where they may be interrupted."""

import math
import time
from collections.abc import Sequence

import torch

from fpt_fast.config import TrainConfig
from fpt_fast.records import EpochRecord
from fpt_fast.trainer.checkpoint import save_best
from fpt_fast.trainer.progress import Progress
from fpt_fast.trainer.ranks import require_same_weights, shares_from
from fpt_fast.trainer.run import Run, leave, save_run
from fpt_fast.trainer.schedule import learning_rate_at
from fpt_fast.trainer.state import BegunEpoch
from fpt_fast.trainer.validation import is_better, validate


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
            run.val_batches,
            run.config,
            run.num_classes,
            run.device,
            explain=epoch == 0,
            class_names=run.class_names,
            world=run.world,
            after_batch=lambda: leave(run, trained) if run.asked_to_stop() else None,
        )
    sizes = torch.tensor(trained.sizes, dtype=torch.float64)
    losses = torch.tensor(trained.losses, dtype=torch.float64)
    record = EpochRecord(
        epoch,
        float((losses * sizes).sum() / sizes.sum()),
        learning_rate_at(epoch + (len(trained.losses) - 1) / len(run.train_batches), run.config),
        trained.seconds + time.monotonic() - start,
        val,
    )
    run.records.append(record)
    value = val.get(run.config.monitor, math.nan)
    # Before last: a kill between the two repeats this epoch's end, and so writes best again.
    if is_better(value, run.best_value, run.config.monitor):
        run.best_epoch, run.best_value = epoch, value
        if run.world.is_first:
            save_best(run.run_dir, run.model, run.extra)
    require_same_weights(run.model, f"after epoch {epoch} (from 0)", run.world)
    save_run(run)
    return record


def _train_epoch(run: Run, epoch: int, bar: Progress) -> BegunEpoch:
    """One pass over the training batches, or the rest of it where the run was put down in one."""
    steps, make_step = len(run.train_batches), run.train_step
    begun, run.begun = run.begun or BegunEpoch(epoch, [], [], 0.0), None
    make_step.begin(epoch, begun.losses)
    sizes = list(begun.sizes)
    first = checked = len(sizes)
    start, detail = time.monotonic() - begun.seconds, ""

    def so_far() -> BegunEpoch:
        """What was done up to here; its losses are finite."""
        values = make_step.losses()
        _check_losses(values[checked:], epoch, checked, run.config)
        return BegunEpoch(epoch, values, list(sizes), time.monotonic() - start)

    run.model.train()
    run.loss.set_epoch(epoch)
    run.train_batches.set_epoch(epoch)
    for step, share in enumerate(shares_from(run.train_batches, first, run.world), first):
        if step == steps:
            break
        with run.profiler.step():
            run.dropout.share = share
            make_step(share.batch)
        sizes.append(share.total)
        if run.asked_to_stop():
            leave(run, so_far())
        if step + 1 - checked == make_step.looks or step + 1 == steps:
            mean = _check_losses(make_step.losses(checked), epoch, checked, run.config)
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
