"""A sweep's checkpoint: one safetensors file, replaced whole after each epoch."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fpt_fast.metrics import finite_or_none
from fpt_fast.model_files import replace_file
from fpt_fast.sweep.group import TrialGroup, TrialState
from fpt_fast.trainer import CheckpointError
from fpt_fast.trainer.state import describe_difference, record_from_json, record_to_json

FORMAT = "fpt-fast sweep 1"


def save_sweep(
    path: Path,
    identity: Mapping[str, Any],
    epoch: int,
    groups: Sequence[TrialGroup],
    states: Sequence[TrialState],
) -> None:
    """Replace ``path``; ``epoch`` counts finished ones.  Raises ``OSError`` on a full disk."""
    tensors: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        tensors[f"{number}.weights"] = group.stack.weights
        for index, moment in enumerate(group.optimizer.moments):
            tensors[f"{number}.moment.{index}"] = moment
    for state in states:
        tensors[f"random.{state.trial.name}"] = state.generator.get_state()
        if state.best_weights is not None:
            tensors[f"best.{state.trial.name}"] = state.best_weights
    described = {
        "format": FORMAT,
        "identity": identity,
        "epoch": epoch,
        "groups": [
            {"steps": group.optimizer.steps, "trials": [s.trial.name for s in group.states]}
            for group in groups
        ],
        "trials": [_describe(state) for state in states],
    }
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save(owned, metadata={"sweep": json.dumps(described, allow_nan=False)}))


def load_sweep(
    path: Path,
    identity: Mapping[str, Any],
    groups: list[TrialGroup],
    states: Sequence[TrialState],
) -> int:
    """Bring fresh ``groups`` and ``states`` to where ``path`` was saved; returns finished epochs.

    ``groups`` keep what still trains.  Without a file this is 0.  Raises ``CheckpointError``
    for a damaged file, or one of another sweep, naming what differs.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get("sweep", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; delete it to start anew") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of a sweep; delete it to start anew")
    difference = describe_difference(described["identity"], json.loads(json.dumps(identity)))
    if difference:
        raise CheckpointError(
            f"the sweep in {path} was started with other settings, so it cannot be resumed: "
            f"{difference}; restore them or choose another directory"
        )
    _restore_trials(described["trials"], states, tensors)
    _restore_groups(described["groups"], groups, tensors)
    return int(described["epoch"])


def _describe(state: TrialState) -> dict[str, Any]:
    return {
        "name": state.trial.name,
        "records": [
            {**record_to_json(record), "loss": finite_or_none(record.loss)}
            for record in state.records
        ],
        "best_epoch": state.best_epoch,
        "best_value": state.best_value,
        "ended": state.ended,
    }


def _restore_trials(
    described: Sequence[Mapping[str, Any]],
    states: Sequence[TrialState],
    tensors: Mapping[str, Tensor],
) -> None:
    for values, state in zip(described, states, strict=True):
        state.records = [
            record_from_json(
                {**record, "loss": math.nan if record["loss"] is None else record["loss"]}
            )
            for record in values["records"]
        ]
        state.best_epoch, state.best_value = values["best_epoch"], values["best_value"]
        state.ended = values["ended"]
        state.generator.set_state(tensors[f"random.{state.trial.name}"])
        best = tensors.get(f"best.{state.trial.name}")
        state.best_weights = None if best is None else best.to(state.stack.weights.device)


def _restore_groups(
    described: Sequence[Mapping[str, Any]],
    groups: list[TrialGroup],
    tensors: Mapping[str, Tensor],
) -> None:
    group_of = {state.trial.name: group for group in groups for state in group.states}
    live: list[TrialGroup] = []
    for number, values in enumerate(described):
        group = group_of[values["trials"][0]]
        names = [state.trial.name for state in group.states]
        group.keep([names.index(name) for name in values["trials"]])
        group.stack.load(tensors[f"{number}.weights"])
        group.optimizer.load(
            values["steps"],
            [tensors[f"{number}.moment.{index}"] for index in range(len(group.optimizer.moments))],
        )
        live.append(group)
    groups[:] = live
