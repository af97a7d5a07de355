"""The images that compared runs were tested on, as far as their data is still there."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fpt_fast.config import ConfigError
from fpt_fast.images import ImageSetError
from fpt_fast.pipeline.data import list_image_set, patients_of, read_as
from fpt_fast.records import AS_THE_FILE_SAYS, ImageItem, Reading
from fpt_fast.run_settings import TrainSettings
from fpt_fast.setting_values import build_settings, parse_values

log = logging.getLogger("fpt_fast")


def recorded_config(folder: Path) -> dict[str, Any]:
    """A run's ``config.yaml``; of pooled folds, that of the first fold; empty without one."""
    path = folder / "config.yaml"
    if folder.parent.name.endswith("-pooled"):
        repeat = folder.parent.name.removesuffix("pooled")
        path = folder.parent.parent / f"{repeat}fold-1" / folder.name / "config.yaml"
    if not path.is_file():
        return {}
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def recorded_items(folders: Sequence[Path]) -> dict[str, ImageItem]:
    """The images by key, from the data of the first run whose data is still there."""
    for folder in folders:
        recorded = recorded_config(folder)
        try:
            values = parse_values(TrainSettings, recorded.get("settings"), str(folder))
            settings = build_settings(TrainSettings, values)
            made = recorded.get("features", {})
            # A run from a cache has its windows from there; what is left out is the default.
            reading = Reading(made.get("window", AS_THE_FILE_SAYS.window), made.get("dicom_frame"))
            images = read_as(list_image_set(settings, settings.data), reading)
        except (ConfigError, ImageSetError, OSError) as error:
            log.info("the data of %s is not there: %s", folder, error)
            continue
        return {item.key: item for item in images.items}
    return {}


def known_patients(keys: Sequence[str], items: Mapping[str, ImageItem]) -> list[str] | None:
    """The patient of each image, or None unless all of them are known."""
    known = [items[key] for key in keys if key in items]
    return patients_of(known) if len(known) == len(keys) else None
