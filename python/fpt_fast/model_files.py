"""The files of a saved model, ``config.json`` and ``model.safetensors``: written whole, read with
suspicion."""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise_tensors
from torch import Tensor, nn

from fpt_fast.files import sync_directory
from fpt_fast.records import BackboneSpec

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_LARGEST_CONFIG = 1 << 24
_LARGEST_NUMBER = 1 << 20

_log = logging.getLogger("fpt_fast")


class ModelFileError(ValueError):
    """A saved model that cannot be used; says which file, what is wrong, what to do."""


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` so that a reader of ``path`` sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_model(
    directory: str | Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write ``description`` as ``config.json`` and ``tensors`` as ``model.safetensors``.

    ``directory`` is made if missing.  Each file is replaced atomically, and the weights carry a
    copy of the description, so that a save killed between the two still loads.  Raises
    ``ValueError`` for values that JSON does not know, ``OSError`` where it cannot be written.
    """
    try:
        text = json.dumps(description, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra must hold JSON values only: {error}") from error
    owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / WEIGHTS_FILE, serialise_tensors(owned, metadata={"fpt_fast": text}))
    replace_file(folder / CONFIG_FILE, text.encode())


def read_model(directory: str | Path, expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what ``write_model`` wrote: the description, of format ``expected``, and the tensors.

    Raises ``FileNotFoundError`` where a file is missing, ``ModelFileError`` where one is damaged.
    """
    folder = Path(directory)
    description = read_description(folder, expected)
    metadata, tensors = _read_weights(folder / WEIGHTS_FILE)
    if "fpt_fast" in metadata:
        own = _parse_description(metadata["fpt_fast"], folder / WEIGHTS_FILE, expected)
        if own != description:
            _log.warning(
                "%s is not the configuration that the weights beside it were saved with "
                "(edited, or a save was interrupted); the weights' own copy is used",
                folder / CONFIG_FILE,
            )
        description = own
    return description, tensors


def read_description(directory: str | Path, expected: str | None = None) -> dict[str, Any]:
    """Read ``config.json`` of a saved model; ``expected`` is its format, or None for any."""
    path = Path(directory) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a folder written by save_pretrained")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ModelFileError(f"{path} has {path.stat().st_size} bytes: not a model's configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is not UTF-8 text: {error}") from error
    return _parse_description(text, path, expected)


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], directory: str | Path) -> None:
    """Load ``tensors`` of ``directory`` into ``model``, as they are: same names, same shapes.

    Raises ``ModelFileError`` naming what is missing, too much, or of another shape.
    """
    _check_tensors(model.state_dict(), tensors, Path(directory) / WEIGHTS_FILE)
    model.load_state_dict(dict(tensors), assign=True)


def trainable_message(trainable: int, total: int) -> str:
    """Trainable, all and their percentage, as peft words it."""
    return (
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )


def _parse_description(text: str, path: Path, expected: str | None) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} does not hold JSON: {error}") from error
    found = description.get("format") if isinstance(description, dict) else None
    if not isinstance(found, str) or (expected is not None and found != expected):
        wanted = "a format of fpt-fast" if expected is None else f"the format {expected!r}"
        raise ModelFileError(f"{path} must have {wanted}, got {found!r}")
    return dict(description)


def _read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a folder written by save_pretrained")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} is not a sound safetensors file: {error}") from error


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            problems.append(
                f"{name} must be {tuple(expected[name].shape)}, got {tuple(found[name].shape)}"
            )
        elif not found[name].is_floating_point():
            problems.append(f"{name} must be of a floating-point dtype, got {found[name].dtype}")
    if problems:
        raise ModelFileError(f"{path} does not hold this model's weights: " + "; ".join(problems))


def spec_from_json(values: Mapping[str, Any]) -> BackboneSpec:
    """A frozen model's description from JSON; ``ValueError`` for what cannot be one."""
    known = [field.name for field in dataclasses.fields(BackboneSpec)]
    if set(values) != set(known):
        raise ValueError(
            f"spec must have exactly the keys {', '.join(known)}, got {sorted(values)}"
        )
    fields = dict(values)
    for name in ("hidden_size", "num_heads", "depth"):
        positive_int(name, fields[name])
    for name in ("patch_size", "image_size"):
        fields[name] = tuple(positive_int(name, number) for number in fields[name])
    for name in ("mean", "std"):
        fields[name] = tuple(float(number) for number in fields[name])
    return BackboneSpec(**fields)


def positive_int(name: str, value: object) -> int:
    """``value``, if it is a whole number that a model's width or count can be."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_NUMBER:
        raise ValueError(f"{name} must be a whole number in 1..{_LARGEST_NUMBER}, got {value!r}")
    return value
