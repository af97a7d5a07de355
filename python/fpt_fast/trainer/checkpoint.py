"""Checkpoints of a run, without pickle, valid at every instant.

``last/`` holds ``model.safetensors``, ``optimizer.safetensors`` and ``state.json``.  The three
belong together, so the whole folder is replaced: written beside, fsynced, renamed.  A kill between
the two renames leaves the previous one as ``last.old``, which ``recover_last`` puts back.

``best/`` is read by others (``from_pretrained``), so it must never be absent: its files are
replaced one by one, weights last.  What stands beside the weights is the same all through a run.
"""

import base64
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fpt_fast.files import sync_directory

FORMAT_VERSION = 2
WEIGHTS_NAME = "model.safetensors"
_OPTIMIZER_NAME = "optimizer.safetensors"
_STATE_NAME = "state.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; says which file and what to do."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All that a run needs to go on: weights, optimiser state by ``index.name``, JSON state."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_last(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Replace ``run_dir/last`` by ``checkpoint``; raises ``OSError`` where the disk is full."""
    recover_last(run_dir)
    new, old, last = (run_dir / name for name in ("last.new", "last.old", "last"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    _write(new / WEIGHTS_NAME, save(checkpoint.model))
    _write(new / _OPTIMIZER_NAME, save(checkpoint.optimizer))
    state = {"format": FORMAT_VERSION, **checkpoint.state}
    _write(new / _STATE_NAME, json.dumps(state, allow_nan=False, indent=1).encode())
    sync_directory(new)
    if last.exists():
        last.rename(old)
    new.rename(last)
    sync_directory(run_dir)
    shutil.rmtree(old, ignore_errors=True)


def recover_last(run_dir: Path) -> None:
    """Put ``last`` back where a kill fell between the renames of ``save_last``."""
    old, last = run_dir / "last.old", run_dir / "last"
    if last.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(last)


def load_last(run_dir: Path) -> Checkpoint | None:
    """Read ``run_dir/last``, or None where the run has none yet.

    Raises ``CheckpointError`` for a file that is absent, damaged or of another format.
    """
    recover_last(run_dir)
    last = run_dir / "last"
    if not last.exists():
        return None
    try:
        state = json.loads((last / _STATE_NAME).read_text())
        if state.get("format") != FORMAT_VERSION:
            raise CheckpointError(
                f"{last / _STATE_NAME} must be of format {FORMAT_VERSION}, got "
                f"{state.get('format')!r}; it was written by another version of fpt-fast"
            )
        return Checkpoint(load_file(last / WEIGHTS_NAME), load_file(last / _OPTIMIZER_NAME), state)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {last}: {error}; delete the run's folder to start anew"
        ) from error


def save_best(run_dir: Path, model: nn.Module, extra: Mapping[str, Any] | None) -> None:
    """Replace ``run_dir/best`` by the model's weights.

    A model with ``save_pretrained(directory, extra=...)`` writes its own files, others
    ``model.safetensors``.  ``extra`` must be the same all through a run (see the module).
    """
    best = run_dir / "best"
    best.mkdir(parents=True, exist_ok=True)
    save_pretrained: Callable[..., object] | None = getattr(model, "save_pretrained", None)
    new = run_dir / "best.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    if save_pretrained is None:
        _write(new / WEIGHTS_NAME, save(cpu_state(model)))
    else:
        save_pretrained(new, extra=None if extra is None else dict(extra))
        for path in new.iterdir():
            _sync_file(path)
    for path in sorted(new.iterdir(), key=lambda path: path.name == WEIGHTS_NAME):
        path.replace(best / path.name)
    sync_directory(best)
    new.rmdir()


def load_weights(model: nn.Module, directory: Path) -> None:
    """Load ``directory/model.safetensors`` (of ``best`` or ``last``) into ``model``.

    Raises ``CheckpointError`` where the file cannot be read, or names or shapes differ.
    """
    path = Path(directory) / WEIGHTS_NAME
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read weights from {path}: {error}") from error
    load_state(model, weights, str(path))


def load_state(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load a state dict strictly; ``CheckpointError`` naming ``source`` where it does not fit."""
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"the weights in {source} do not fit this model: {error}; "
            "build the model with the run's own configuration"
        ) from error


def cpu_state(model: nn.Module) -> dict[str, Tensor]:
    """State dict as own, contiguous tensors on the CPU, as safetensors asks."""
    return {name: _own(tensor) for name, tensor in model.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of the optimiser as flat names: ``"3.exp_avg"`` for parameter 3."""
    return {
        f"{index}.{name}": _own(value)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Inverse of ``optimizer_tensors``, for an optimiser over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for flat, tensor in tensors.items():
        index, _, name = flat.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def random_state(device: torch.device) -> dict[str, str | None]:
    """State of torch's generators of the CPU and of ``device``, as JSON values."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {
        "cpu": _to_text(torch.get_rng_state()),
        "cuda": None if cuda is None else _to_text(cuda),
    }


def restore_random_state(state: Mapping[str, str | None], device: torch.device) -> None:
    """Inverse of ``random_state``; a generator that the checkpoint lacks stays as it is."""
    cpu, cuda = state["cpu"], state["cuda"]
    if cpu is not None:
        torch.set_rng_state(_from_text(cpu))
    if cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(_from_text(cuda), device)


def _to_text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _from_text(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)


def _own(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
