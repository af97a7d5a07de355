"""What can be refused before torch is imported, which takes seconds: paths that are not there and
settings that cannot be read.  Whoever does the work checks again, and more."""

from pathlib import Path
from typing import Any

from fpt_fast.config import ConfigError
from fpt_fast.hub import is_repository
from fpt_fast.run_settings import RunSettings
from fpt_fast.setting_values import parse_size
from fpt_fast.settings import DoctorSettings, OnlineSettings

# Settings that name what must be there, and what it is.
_THERE = {
    "data": "a folder of images, or a CSV list",
    "checkpoint_path": "a file of weights",
}
_SIZES = ("input_size", "side_size")


def look(command: Any) -> None:
    """Raise ``ConfigError`` for what ``command``, the settings of any, cannot be run with."""
    for name, what in _THERE.items():
        # The doctor reports what is missing among its findings.
        path = None if isinstance(command, DoctorSettings) else getattr(command, name, None)
        if isinstance(path, Path) and not path.exists():
            raise ConfigError(
                f"no such file or directory: {path}; --{name.replace('_', '-')} names {what}"
            )
    for name in _SIZES:
        size = getattr(command, name, None)
        if size is not None:
            parse_size(name, size)
    for path in command.images if isinstance(command, OnlineSettings) else ():
        if not path.exists():
            raise ConfigError(
                f"no such file or directory: {path}; --images names images, folders or CSV lists"
            )
    _look_for_features(command)
    _look_for_run(command)


def _look_for_features(command: Any) -> None:
    """A cache that training reads must be there; one that is made need not."""
    cache = getattr(command, "cache", None)
    # An empty one is said by those that know whether the method needs any.
    if isinstance(cache, str) and cache not in ("", "none") and not Path(cache).exists():
        data = getattr(command, "data", None) or "DATA"
        raise ConfigError(
            f"no feature cache at {cache}; make it with fpt-fast preload --data {data} --backbone "
            f"... --cache {cache}, or train without one: --cache none"
        )


def _look_for_run(command: Any) -> None:
    """A trained run that is read must be there: a folder, or one on the hub."""
    run = getattr(command, "run", None)
    # Training makes its run, and knows by itself what may be replaced.
    if not isinstance(run, Path) or isinstance(command, DoctorSettings | RunSettings):
        return
    if not run.is_dir() and not is_repository(str(run)):
        raise ConfigError(f"{run} holds no trained model: there is no such folder")
