"""Settings of the commands that mend, import and convert a feature cache (see ``settings``)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fpt_fast.records import Attention, FeatureDtype, Importance
from fpt_fast.settings import BackboneSettings, Device, InputSettings

EightBitDtype = Literal["int8", "float8_e4m3fn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairSettings(BackboneSettings):
    """Rebuild only the bad records of a feature cache; how they were made, the cache knows."""

    cache: Path
    """Directory of the cache."""
    backbone: str
    """The frozen model that made it: timm name or directory (its weights are checked)."""
    attention: Attention = "auto"
    """Implementation of its attention (fpt-fast info lists them); they differ by rounding only."""
    device: Device = "auto"
    """Where the frozen pass runs."""
    batch_size: int = 8
    """Images per frozen pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportSettings(InputSettings):
    """Turn features preloaded by the authors' code into a cache; what differs is said."""

    features: Path
    """Folder with the authors' NAME.safetensors files."""
    cache: Path
    """Directory of the cache to write."""
    backbone: str
    """The frozen model that made them: timm name, or Hugging Face directory."""
    method: Literal["fpt_plus", "fpt"] = "fpt_plus"
    """Method whose layers were extracted."""
    layers: str | None = None
    """Layers that were extracted, as layers_to_extract had them, if not the method's own."""
    token_ratio: float = 0.2
    """Token ratio that they were made with."""
    importance: Importance = "global"
    """Token importance that they were made with."""
    input_size: str = "512"
    """Input of the frozen model that they were made at."""
    dtype: FeatureDtype = "float16"
    """What the cache keeps them in; 8 bits (int8, float8_e4m3fn) halve it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertSettings:
    """Write the features of a float16 cache into a new cache of 8 bits, half as large."""

    source: Path
    """Directory of the cache to read; it stays as it is."""
    target: Path
    """Directory of the cache to write; an unfinished one is resumed."""
    dtype: EightBitDtype = "int8"
    """What the new cache keeps keys and values in."""
    batch_size: int = 16
    """Records that are converted at a time."""
