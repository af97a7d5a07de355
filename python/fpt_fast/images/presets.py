"""Published settings of the papers' data sets."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True, slots=True)
class DatasetPreset:
    """Settings of one data set: normalisation of values in [0, 1], learning rate, input pixels."""

    name: str
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    learning_rate: float
    input_size: int


def dataset_preset(name: str) -> DatasetPreset:
    """Return the published settings of data set ``name``; ValueError names those there are."""
    presets = _presets()
    if name.lower() not in presets:
        raise ValueError(
            f"no preset for a data set named {name!r}; there are {', '.join(presets)}. For another "
            "data set give its mean and std, or have them measured ('auto')"
        )
    return presets[name.lower()]


def preset_names() -> tuple[str, ...]:
    """Return the names that ``dataset_preset`` knows, in alphabetical order."""
    return tuple(_presets())


@cache
def _presets() -> dict[str, DatasetPreset]:
    text = files("fpt_fast.images").joinpath("presets.json").read_text(encoding="utf-8")
    return {
        name: DatasetPreset(
            name=name,
            num_classes=values["num_classes"],
            mean=tuple(values["mean"]),
            std=tuple(values["std"]),
            learning_rate=values["learning_rate"],
            input_size=values["input_size"],
        )
        for name, values in sorted(json.loads(text).items())
    }
