"""Weights of the authors' code, as ``.pt`` state dicts, to and from ``FptModel``."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpt_fast.config import FptConfig
from fpt_fast.model import FptModel
from fpt_fast.model_files import replace_file
from fpt_fast.records import BackboneSpec

_SIDE = "side_encoder.vit."
_QKV = ("query", "key", "value")

# Ours on the left, theirs on the right; "{i}" is the layer.  ``qkv`` is theirs in three pieces.
_NAMES = {
    "side.cls_token": _SIDE + "embeddings.cls_token",
    "side.positions": _SIDE + "embeddings.position_embeddings",
    "side.patch_embed": _SIDE + "embeddings.patch_embeddings.projection",
    "side.norm": _SIDE + "layernorm",
    "side.head": "side_encoder.classifier",
    "fusion.prompts": "fusion_module.prompts",
    "fusion.layer_norm": "fusion_module.layer_norm",
    "fusion.prompt_proj": "fusion_module.prompt_proj",
    "fusion.out_proj": "fusion_module.out_proj",
}
_LAYER_NAMES = {
    "norm1": "layernorm_before",
    "qkv": "attention.attention",
    "proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
_LAYER = re.compile(r"side\.layers\.(\d+)\.(\w+)")


class CheckpointError(ValueError):
    """A checkpoint that is not the authors' model; says what is missing, unexpected or unsound."""


def load_checkpoint(path: str | Path, *, config: FptConfig, spec: BackboneSpec) -> FptModel:
    """Read weights saved by the authors' code into a native model, in evaluation mode.

    ``path`` is ``best_validation_weights.pt``, ``final_weights.pt`` or ``checkpoint.pt`` (whose
    optimiser state is left behind).  ``config`` and ``spec`` say what the file does not: method,
    layers, side input, heads.  The number of outputs is read from the file.  It is opened with
    ``weights_only=True``, so that it cannot run code.  Raises ``CheckpointError`` where it does
    not hold exactly this model's weights, ``OSError`` where it cannot be read.
    """
    reference = read_state_dict(path)
    head = reference.get("side_encoder.classifier.bias")
    if head is None or head.ndim != 1 or not len(head):
        raise CheckpointError(f"{path} lacks side_encoder.classifier.bias: not the authors' model")
    # Without storage: the weights come from the file, and shapes are compared before any is made.
    with torch.device("meta"):
        model = FptModel(config, spec, num_outputs=len(head))
    weights = to_native(reference, model)
    model.load_state_dict(weights, assign=True)
    return model.eval()


def save_checkpoint(model: FptModel, path: str | Path) -> None:
    """Write a native model's weights as the authors' ``load_weights`` reads them."""
    buffer = io.BytesIO()
    torch.save(to_reference(model), buffer)
    replace_file(Path(path), buffer.getvalue())


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.pt`` file of the authors' code: its tensors, by name, on the CPU."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(f"{path} is not a file of plain tensors: {error}") from error
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    ):
        raise CheckpointError(f"{path} must hold tensors by name, got {_describe(content)}")
    return dict(content)


def to_native(reference: Mapping[str, Tensor], model: FptModel) -> dict[str, Tensor]:
    """Turn a state dict of the authors' model into one for ``model``, which is not changed.

    Raises ``CheckpointError`` naming every tensor that is missing, unexpected or of another shape.
    """
    problems: list[str] = []
    used: set[str] = set()
    weights: dict[str, Tensor] = {}
    for name, expected in model.state_dict().items():
        theirs = reference_names(name)
        used.update(theirs)
        missing = [one for one in theirs if one not in reference]
        if missing:
            problems += [f"missing {one}" for one in missing]
            continue
        shape = _reference_shape(name, expected, model)
        pieces = [reference[one] for one in theirs]
        wrong = [one for one in theirs if tuple(reference[one].shape) != shape]
        if wrong:
            problems += [
                f"{one} must be {shape}, got {tuple(reference[one].shape)}" for one in wrong
            ]
            continue
        weights[name] = torch.cat(pieces).reshape(expected.shape).to(torch.float32)
    problems += [f"unexpected {name}" for name in reference if name not in used]
    if problems:
        raise CheckpointError("these are not the weights of this model: " + "; ".join(problems))
    return weights


def to_reference(model: FptModel) -> dict[str, Tensor]:
    """Return ``model``'s weights under the authors' names and shapes, on the CPU."""
    reference: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        theirs = reference_names(name)
        shape = _reference_shape(name, tensor, model)
        for one, piece in zip(theirs, tensor.detach().cpu().chunk(len(theirs)), strict=True):
            reference[one] = piece.reshape(shape).clone()
    return reference


def reference_names(name: str) -> tuple[str, ...]:
    """Return the authors' names of one of our tensors: one, or three for a fused ``qkv``."""
    layer = _LAYER.match(name)
    if layer is None:
        stem, kind = name, ""
        if stem not in _NAMES:
            stem, _, kind = name.rpartition(".")
        return (_NAMES[stem] + (f".{kind}" if kind else ""),)
    number, part = layer.groups()
    kind = name.rpartition(".")[2]
    stem = f"{_SIDE}encoder.layer.{number}.{_LAYER_NAMES[part]}"
    if part == "qkv":
        return tuple(f"{stem}.{one}.{kind}" for one in _QKV)
    return (f"{stem}.{kind}",)


def _reference_shape(name: str, tensor: Tensor, model: FptModel) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    if name == "side.patch_embed.weight":
        return (shape[0], 3, *model.side.patch_size)
    pieces = len(reference_names(name))
    return (shape[0] // pieces, *shape[1:])


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return "a mapping with the keys " + ", ".join(map(repr, list(content)[:5]))
    return f"a {type(content).__name__}"
