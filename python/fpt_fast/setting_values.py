"""Settings as YAML files and keyword arguments hold them: read, checked, and written back."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from fpt_fast.config import ConfigError
from fpt_fast.words import what_was_meant

_T = TypeVar("_T")

# Settings of a run that only say again what a feature cache has, and has under the same name.
_SETTLED_BY_A_CACHE = (
    *("fit", "window", "dicom_frame", "position_interpolation", "dtype", "mean", "std"),
)


def parse_size(name: str, text: str | int) -> tuple[int, int]:
    """Read ``512`` or ``768x512`` as (height, width) in pixels."""
    parts = str(text).lower().split("x")
    if len(parts) in (1, 2) and all(part.isdigit() and int(part) > 0 for part in parts):
        return int(parts[0]), int(parts[-1])
    raise ConfigError(f"{name} must be a size like 512 or HEIGHTxWIDTH like 768x512, got {text!r}")


def parse_steps(name: str, text: str | None) -> range | None:
    """Read ``20:30`` as the steps from 20 up to 30, which is left out."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if colon and first.isdigit() and last.isdigit() and int(first) < int(last):
        return range(int(first), int(last))
    raise ConfigError(f"{name} must be a first and a last step like 20:30, got {text!r}")


def read_yaml(path: Path, settings: type[Any]) -> dict[str, Any]:
    """Read the keys of ``settings`` from a YAML file; an unknown key is an error."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if values is None:
        return {}
    if isinstance(values, dict) and isinstance(values.get("settings"), dict):
        values = settings_of_run(values)
        _refuse_for_another_command(path, values, settings)
    return parse_values(settings, values, str(path))


def settings_of_run(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a run's own ``config.yaml``, read as ``values``.

    What its cache had settled is as its features have it: earlier versions wrote defaults there.
    """
    settings = dict(values["settings"])
    if settings.get("cache") in (None, "", "none"):
        return settings
    features = values.get("features") or {}
    settled = {name: features.get(name) for name in _SETTLED_BY_A_CACHE if name in settings}
    return settings | settled | {"normalization": None}


def _refuse_for_another_command(path: Path, values: Mapping[str, Any], settings: type[Any]) -> None:
    """Raise ``ConfigError`` where a run's own file is given to a command that did not write it."""
    known = {field.name for field in dataclasses.fields(settings)}
    of_sweep = "halve_every" in values
    if "resume" in known and ("halve_every" in known) == of_sweep:
        return
    instead = f"here a file may hold {', '.join(sorted(known))}"
    if "run" in known and "resume" not in known:
        instead = f"here --run {path.parent} says it all: leave --config out"
    raise ConfigError(
        f"{path} is the config.yaml of a run, which fpt-fast {'sweep' if of_sweep else 'train'} "
        f"wrote and takes; {instead}"
    )


def parse_values(settings: type[Any], values: Any, where: str) -> dict[str, Any]:
    """Check keys and types of ``values`` read from ``where`` against the fields of ``settings``."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold keys and values, got {type(values).__name__}")
    known = {field.name for field in dataclasses.fields(settings)}
    renamed = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(renamed) - known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; {_known(unknown, known)}"
        )
    hints = get_type_hints(settings)
    return {key: _from_yaml(key, value, hints[key]) for key, value in renamed.items()}


def to_yaml_values(settings: Any) -> dict[str, Any]:
    """Settings as values that YAML can hold and ``read_yaml`` reads back."""
    return {
        field.name: _to_yaml(getattr(settings, field.name))
        for field in dataclasses.fields(settings)
    }


def build_settings(settings: type[_T], values: Mapping[str, Any]) -> _T:
    """Make settings from keywords; a missing one is named."""
    missing = [
        field.name
        for field in dataclasses.fields(settings)  # type: ignore[arg-type]
        if field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
        and field.name not in values
    ]
    if missing:
        raise ConfigError(f"{settings.__name__} needs {', '.join(missing)}")
    hints = get_type_hints(settings)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ConfigError(
            f"{settings.__name__} has no {', '.join(map(repr, unknown))}; {_known(unknown, hints)}"
        )
    for name, value in values.items():
        _check_list(name, value, hints[name])
    return settings(**{name: _as_path(value, hints[name]) for name, value in values.items()})


def _known(unknown: Iterable[str], known: Iterable[str]) -> str:
    """What ``unknown`` names may have meant, then all that there are."""
    names = sorted(known)
    meant = [words for name in unknown for words in what_was_meant(name, names)]
    return "; ".join([*meant, f"known are {', '.join(names)}"])


def _check_list(name: str, value: Any, hint: Any) -> None:
    """Raise ``ConfigError`` for a text where several values belong: it would be taken apart into
    its letters."""
    if isinstance(value, str) and _is_list(hint):
        parts = [part.strip() for part in value.split(",")]
        raise ConfigError(
            f"{name} must be a list like [{', '.join(parts)}], got the text {value!r}"
        )


def _is_list(hint: Any) -> bool:
    """True for a field of several values and nothing else."""
    options = [option for option in get_args(hint) if option is not type(None)]
    return get_origin(hint) is tuple or (
        get_origin(hint) in (Union, UnionType) and all(map(_is_list, options))
    )


def _as_path(value: Any, hint: Any) -> Any:
    """A path may be given as text, and text (``cache``) as a path."""
    options = (hint, *get_args(hint))
    if isinstance(value, str) and Path in options and str not in options:
        return Path(value)
    if isinstance(value, Path) and str in options and Path not in options:
        return str(value)
    if isinstance(value, list | tuple) and get_args(hint) and Path in get_args(hint):
        return tuple(Path(item) for item in value)
    return value


def _from_yaml(key: str, value: Any, hint: Any) -> Any:
    """Turn YAML's strings and lists into the paths and tuples of the field."""
    options = get_args(hint)
    if value is None:
        if type(None) not in options:
            raise ConfigError(f"{key} must have a value; leave the key out for the default")
        return None
    if get_origin(hint) is Literal:
        if value not in options:
            raise ConfigError(f"{key} must be one of {', '.join(map(str, options))}, got {value!r}")
        return value
    _check_list(key, value, hint)
    if isinstance(value, list):
        inner = Path if Path in (*options, *_inner(hint)) else None
        return tuple(inner(item) if inner else item for item in value)
    if hint is Path or Path in options:
        return Path(str(value))
    if hint is str or str in options:
        return str(value)
    if hint is bool and not isinstance(value, bool):
        raise ConfigError(f"{key} must be true or false, got {value!r}")
    if hint is int and not (isinstance(value, int) and not isinstance(value, bool)):
        raise ConfigError(f"{key} must be a whole number, got {value!r}")
    if (hint in (int, float) or int in options or float in options) and not isinstance(
        value, int | float
    ):
        # YAML reads 1e-4 (no dot) as a string.
        try:
            return float(value)
        except ValueError:
            raise ConfigError(f"{key} must be a number, got {value!r}") from None
    return value


def _inner(hint: Any) -> tuple[Any, ...]:
    found: tuple[Any, ...] = ()
    for option in (hint, *get_args(hint)):
        found += get_args(option)
    return found


def _to_yaml(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_to_yaml(item) for item in value]
    return value
