"""Composing a Hydra configuration as the authors' ``main.py`` gets it, without Hydra."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_LARGEST_FILE = 1 << 20


class ReferenceConfigError(ValueError):
    """A configuration of the authors' code that cannot be read; says where, and what to do."""


def compose(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the tree of values of a resolved YAML file, or of a folder with ``config.yaml``.

    Of Hydra's language it knows what the authors' files use: a ``defaults`` list of groups and
    files, choices (``network=FPT``) and dotted overrides (``++train.epochs=3``).  Raises
    ``ReferenceConfigError`` for the rest, such as interpolations, and for what is not there.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is neither a YAML file nor a folder of configurations")
    folder = path if path.is_dir() else path.parent
    tree = _read(path / "config.yaml" if path.is_dir() else path)
    defaults = tree.pop("defaults", None)
    choices, changes = _split(overrides, defaults)
    if defaults is not None:
        merged: dict[str, Any] = {}
        for entry in _check_defaults(defaults, path):
            if entry == "_self_":
                _merge(merged, tree)
            elif isinstance(entry, str):
                _merge(merged, _read(folder / f"{_plain(entry)}.yaml"))
            else:
                ((group, choice),) = entry.items()
                chosen = _plain(choices.get(group, choice))
                _merge(merged, {group: _read(folder / _plain(group) / f"{chosen}.yaml")})
        tree = merged if "_self_" in defaults else _merge(merged, tree)
    for key, value in changes:
        _set(tree, key, value)
    _refuse_interpolation(tree, "")
    return tree


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    if path.stat().st_size > _LARGEST_FILE:
        raise ReferenceConfigError(f"{path} has {path.stat().st_size} bytes: not a configuration")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ReferenceConfigError(f"{path} does not hold YAML: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ReferenceConfigError(f"{path} must hold names with values, got {values!r}")
    return values


def _plain(name: object) -> str:
    if not isinstance(name, str) or Path(name).name != name:
        raise ReferenceConfigError(f"a group or choice must be a plain name, got {name!r}")
    return name


def _check_defaults(defaults: object, path: Path) -> list[Any]:
    sound = isinstance(defaults, list) and all(
        isinstance(entry, str) or (isinstance(entry, dict) and len(entry) == 1)
        for entry in defaults
    )
    if not isinstance(defaults, list) or not sound:
        raise ReferenceConfigError(
            f"{path}: defaults must be a list of files and 'group: choice', got {defaults!r}"
        )
    return defaults


def _split(
    overrides: Sequence[str], defaults: object
) -> tuple[dict[str, str], list[tuple[str, Any]]]:
    groups = {
        name
        for entry in (defaults if isinstance(defaults, list) else ())
        if isinstance(entry, dict)
        for name in entry
    }
    choices: dict[str, str] = {}
    changes: list[tuple[str, Any]] = []
    for override in overrides:
        name, equals, text = override.lstrip("+").partition("=")
        if not equals or not name:
            raise ReferenceConfigError(f"an override must be like 'key=value', got {override!r}")
        if name in groups:
            choices[name] = text
        elif "." not in name:
            raise ReferenceConfigError(
                f"{override!r} chooses from the group {name!r}, which is not in the folder's "
                f"defaults; groups are {', '.join(sorted(groups)) or 'none (a resolved file)'}"
            )
        else:
            changes.append((name, yaml.safe_load(text)))
    return choices, changes


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    *groups, name = key.split(".")
    for group in groups:
        branch = tree.setdefault(group, {})
        if not isinstance(branch, dict):
            raise ReferenceConfigError(f"{key} cannot be set: {group} is a value, not a group")
        tree = branch
    tree[name] = value


def _merge(into: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    for key, value in other.items():
        present = into.get(key)
        if isinstance(present, dict) and isinstance(value, dict):
            _merge(present, value)
        else:
            into[key] = value
    return into


def _refuse_interpolation(values: Any, key: str) -> None:
    if isinstance(values, dict):
        for name, value in values.items():
            _refuse_interpolation(value, f"{key}.{name}".lstrip("."))
    elif isinstance(values, str) and "${" in values:
        raise ReferenceConfigError(
            f"{key} is {values!r}: interpolations are not resolved here; give the cfg.yaml that "
            "their training writes, or override the key with a plain value"
        )
