"""A training run under way, and how it is put down and taken up again."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpt_fast.config import TrainConfig
from fpt_fast.distributed import World
from fpt_fast.interrupts import StopRequest
from fpt_fast.losses import EpochLoss
from fpt_fast.profiling import StepProfiler
from fpt_fast.records import EpochRecord
from fpt_fast.trainer.batches import EpochBatches
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
    save_last,
)
from fpt_fast.trainer.ranks import WholeDropout, checkpoint_of_first
from fpt_fast.trainer.state import (
    BegunEpoch,
    begun_from_json,
    begun_to_json,
    describe_difference,
    record_from_json,
    record_to_json,
)
from fpt_fast.trainer.step import TrainStep

LOGGER = logging.getLogger("fpt_fast")


@dataclass(slots=True)
class Run:
    """A run under way: what does not change, then what each epoch changes.

    ``begun`` is the epoch that a resumed run finds itself in the middle of; ``train_step`` is set
    once the run is resumed.
    """

    model: nn.Module
    parameters: list[nn.Parameter]
    loss: EpochLoss
    optimizer: torch.optim.Optimizer
    train_batches: EpochBatches
    val_batches: EpochBatches | None
    config: TrainConfig
    num_classes: int
    class_names: Sequence[str] | None
    identity: dict[str, Any]
    run_dir: Path
    device: torch.device
    extra: Mapping[str, Any] | None
    checkpoint_steps: int
    profiler: StepProfiler
    world: World
    records: list[EpochRecord]
    best_epoch: int | None = None
    best_value: float | None = None
    begun: BegunEpoch | None = None
    train_step: TrainStep = field(init=False)
    labels_checked: bool = False
    stop: StopRequest = field(default_factory=StopRequest)
    dropout: WholeDropout = field(default_factory=WholeDropout)

    def asked_to_stop(self) -> bool:
        """Whether any rank was asked to; all ranks ask this together."""
        return self.world.any(self.stop.requested, "training")


def save_run(run: Run, begun: BegunEpoch | None = None) -> None:
    """Replace ``last`` by the state of ``run``: after an epoch, or in the midst of ``begun``."""
    if not run.world.is_first:
        return
    state = {
        "identity": run.identity,
        "records": [record_to_json(record) for record in run.records],
        "best_epoch": run.best_epoch,
        "best_value": run.best_value,
        "begun": None if begun is None else begun_to_json(begun),
        "random": random_state(run.device),
        "step": run.train_step.state(),
    }
    save_last(
        run.run_dir, Checkpoint(cpu_state(run.model), optimizer_tensors(run.optimizer), state)
    )


def leave(run: Run, begun: BegunEpoch) -> None:
    """Put down all that was done so far, and raise ``Stopped``."""
    save_run(run, begun)
    # A launcher ends the others once one has left: none leaves before the checkpoint is written.
    run.world.meet("writing the checkpoint")
    run.stop.check(
        f"{begun.epoch} of {run.config.epochs} epochs and {len(begun.losses)} of "
        f"{len(run.train_batches)} steps of the next are in {run.run_dir / 'last'}; "
        "resume the run to go on from there",
        elsewhere=True,
    )


def _advice(difference: str) -> str:
    """What to do about a run that was asked to go on otherwise than it was begun."""
    if "config.epochs" in difference:
        return (
            "a run cannot be made longer or shorter, since its learning rate falls over all of "
            "its epochs: resume it with the number that it was begun with, or train anew in "
            "another run directory (the cache is used again)"
        )
    return "restore them or choose another run_dir"


def resume_run(run: Run, resume: bool) -> dict[str, Any]:
    """Take up the state of ``last``, or make sure that there is none to overwrite; returns what
    ``run.train_step`` is to take up."""
    checkpoint = load_last(run.run_dir) if run.world.is_first else None
    checkpoint = checkpoint_of_first(checkpoint, run.world)
    if checkpoint is None:
        return {}
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
            f"{difference}; {_advice(difference)}"
        )
    load_state(run.model, checkpoint.model, str(run.run_dir / "last"))
    restore_optimizer(run.optimizer, checkpoint.optimizer)
    restore_random_state(state["random"], run.device)
    run.records = [record_from_json(record) for record in state["records"]]
    run.best_epoch, run.best_value = state["best_epoch"], state["best_value"]
    run.begun = None if state["begun"] is None else begun_from_json(state["begun"])
    steps = 0 if run.begun is None else len(run.begun.losses)
    LOGGER.info(
        "resuming %s after epoch %d%s",
        run.run_dir,
        len(run.records),
        f" and {steps} steps of the next" if steps else "",
    )
    taken: dict[str, Any] = state.get("step", {})
    return taken
