"""Made data sets as folders: whole or not there, and reused where the settings are the same."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def make_folder(
    root: Path, settings: Mapping[str, Any], marker: str, write: Callable[[Path], None]
) -> None:
    """Have ``write(folder)`` fill a folder that then appears as ``root``, with ``settings`` in the
    JSON file ``marker``.

    A complete one made with the same settings is left alone, one made with others is replaced.
    Raises FileExistsError where ``root`` holds something without that marker.
    """
    if _is_reusable(root, settings, marker):
        return
    partial = root.with_name(f"{root.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        write(partial)
        (partial / marker).write_text(json.dumps(settings, indent=2) + "\n")
        if root.exists():
            shutil.rmtree(root)
        partial.rename(root)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_reusable(root: Path, settings: Mapping[str, Any], marker: str) -> bool:
    """Whether ``root`` is this very data set; refuses a folder that is none of ours."""
    if not root.exists():
        return False
    path = root / marker
    if not path.is_file():
        if root.is_dir() and not any(root.iterdir()):
            return False
        kind = marker.removesuffix(".json")
        raise FileExistsError(f"{root} exists and is no {kind} data set: choose another folder")
    found: object = json.loads(path.read_text())
    return found == settings
