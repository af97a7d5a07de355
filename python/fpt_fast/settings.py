"""Settings of each command: what the user may say by flag, YAML or keyword argument.

Every field is a command-line flag of the same name (``input_size`` is ``--input-size``) and a
key of a YAML file; the text below a field is its help text.
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from fpt_fast.config import ConfigError, Loss, LossWeight
from fpt_fast.records import Attention, FeatureDtype, Importance, Split

_T = TypeVar("_T")

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
EightBitDtype = Literal["int8", "float8_e4m3fn"]


def _default_workers() -> int:
    return max(1, min(8, os.cpu_count() or 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Where the images are and how they are split."""

    data: Path
    """Folder (train/val/test/class, or class) or CSV list (path, label[, split])."""
    split_ratios: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of train, val and test where the data brings no splits; stratified by class."""
    split_seed: int = 0
    """Seed of that split."""
    path_column: str = "path"
    """CSV column of the image path, relative to the CSV file."""
    label_column: str = "label"
    """CSV column of the class."""
    split_column: str = "split"
    """CSV column of the split (train, val, test), if there is one."""
    skip_unreadable: bool = False
    """Go on without images that cannot be decoded (they are listed either way)."""
    workers: int = dataclasses.field(default_factory=_default_workers)
    """Threads that decode images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneSettings(DataSettings):
    """Where the weights of the frozen model are."""

    checkpoint_path: Path | None = None
    """Weights for a timm model name, instead of downloading them."""
    pretrained: bool = True
    """Load the weights that timm publishes under that name (no: random weights)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSettings(BackboneSettings):
    """How images become the frozen model's input."""

    normalization: str = "auto"
    """auto (measured on the training images), backbone (the model's own), or a data set's preset
    name (messidor2, ddr, isic2018, ...)."""
    mean: tuple[float, float, float] | None = None
    """Channel means in [0, 1], instead of --normalization."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations in [0, 1], with --mean."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenSettings(InputSettings):
    """How the frozen pass runs."""

    position_interpolation: Literal["timm", "bicubic_scale"] = "timm"
    """How position embeddings are resized; bicubic_scale is the authors' way."""
    dtype: Dtype = "auto"
    """Arithmetic of the frozen pass."""
    attention: Attention = "auto"
    """Implementation of its attention (fpt-fast info lists them); they differ by rounding only."""
    device: Device = "auto"
    """Where it runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreloadSettings(FrozenSettings):
    """Run the frozen model once over every image and keep the selected keys and values on disk."""

    backbone: str
    """timm model name, or a directory with a Hugging Face ViT (config.json, safetensors)."""
    cache: Path
    """Directory of the feature cache; an unfinished one is resumed."""
    method: Literal["fpt_plus", "fpt"] = "fpt_plus"
    """Method whose layers are extracted: FPT+ the last half, FPT all."""
    layers: str | None = None
    """Layers to extract instead, 0-based: 6-11 or 0,2,5."""
    token_ratio: float = 0.2
    """Share of tokens kept per head, class token counted."""
    importance: Importance = "global"
    """Token importance: mean over all queries, or the class token's row of the map."""
    input_size: str = "512"
    """Input of the frozen model in pixels: 512, or HEIGHTxWIDTH."""
    features: FeatureDtype = "float16"
    """What keys and values are kept in; 8 bits (int8, float8_e4m3fn) halve the cache."""
    batch_size: int = 8
    """Images per frozen pass."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings(FrozenSettings):
    """What training and a sweep of trainings have in common."""

    cache: str
    """Directory of the feature cache, or none: a frozen pass for every batch instead."""
    run: Path
    """Directory for the run's files: must not exist yet, or see --resume and --overwrite."""
    resume: bool = False
    """Continue an interrupted run from its last checkpoint."""
    overwrite: bool = False
    """Replace the files of an earlier run."""

    method: Literal["fpt_plus", "fpt"] = "fpt_plus"
    """FPT+ or FPT."""
    layers: str | None = None
    """Extracted layers; with a cache, must be those it was made with."""
    token_ratio: float | None = None
    """Share of tokens kept; with a cache, must be the one it was made with."""
    importance: Importance | None = None
    """Token importance; with a cache, must be the one it was made with."""
    input_size: str | None = None
    """Input of the frozen model; with a cache, must be the one it was made with."""
    features: FeatureDtype | None = None
    """What features are kept in (default float16); with a cache, must be what it has."""
    backbone: str | None = None
    """Frozen model; needed with --cache none, else must be the one the cache was made with."""
    augment_input: bool = False
    """Augment the frozen model's input too (only with --cache none)."""

    fusion: bool = True
    """False trains the side network alone."""
    side_size: str | None = None
    """Side input in pixels (default 128 for FPT+, 224 for FPT), or HEIGHTxWIDTH."""
    side_reduction: int | None = None
    """Frozen width over side width (default 8)."""

    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 16
    """Images per step."""
    preset: str | None = None
    """Data set whose published learning rate to use (messidor2, ddr, isic2018, ...)."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimiser."""
    clip_norm: float = 1.0
    """Largest norm of the gradient."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up."""
    loss: Loss = "cross_entropy"
    """Loss; the last three treat the label as a grade with one output."""
    loss_weight: LossWeight = "none"
    """Class weights of the cross-entropy."""
    loss_weights: tuple[float, ...] = ()
    """One weight per class, with --loss-weight given."""
    loss_weight_decay: float = 0.9
    """Factor per epoch from balanced to equal weights, with --loss-weight dynamic."""
    monitor: str | None = None
    """Validation metric that picks the best epoch (default auc; mae where the label is a grade)."""
    eval_interval: int = 1
    """Epochs between validations."""
    augment: bool = True
    """Augment the side input as published."""
    side_images: Literal["stored", "exact"] = "stored"
    """stored: decode and shrink the side input once, to twice its size; exact: decode the
    original in every epoch, as published."""
    side_cache: Path | None = None
    """Folder to keep the stored side images in, so that later runs need not decode either."""
    deterministic: bool = False
    """Refuse operations that may give other bits in a rerun (a CPU needs no telling)."""
    report_images: int = 6
    """Test images drawn in the report with their kept tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings(RunSettings):
    """Train the prompts and the side network from a feature cache, then test the best epoch."""

    num_prompts: int | None = None
    """Prompts per layer (default 16)."""
    learning_rate: float | None = None
    """Peak learning rate (default: that of the preset named by --preset, else 1e-4)."""
    weight_decay: float = 0.1
    """Weight decay."""
    seed: int = 0
    """Seed of weights, order, augmentation and dropout."""
    order_seed: int | None = None
    """Seed of the order of the training images alone (default: --seed); the models of a sweep,
    each with its own seed, share one order."""
    checkpoint_steps: int = 0
    """Steps between checkpoints within an epoch (0: after each epoch, and on SIGTERM)."""
    profile_steps: str | None = None
    """Steps to capture in Nsight, like 20:30 (see docs/profiling.md)."""
    tensorboard: bool = False
    """Write TensorBoard files into the run (needs the tensorboard extra)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSettings(RunSettings):
    """Train many models side by side on one stream of features, all combinations of what is
    listed; each ends up in a folder of its own, as if trained alone."""

    learning_rate: str | None = None
    """Peak learning rates, as 5e-5,1e-4 (default: the one that train would take)."""
    seed: str = "0"
    """Seeds of weights, augmentation and dropout, as 0-4 or 0,1,7."""
    weight_decay: str = "0.1"
    """Weight decays."""
    prompts: str | None = None
    """Numbers of prompts per layer (default 16)."""
    order_seed: int = 0
    """Seed of the order of the training images, which all models see alike."""
    halve_every: int | None = None
    """End the worse half of the models, by --monitor, after every so many epochs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateSettings:
    """Evaluate a trained run on a split of its data."""

    run: Path
    """Directory of the run."""
    split: Split = "test"
    """Split to evaluate."""
    data: Path | None = None
    """Other data than the run was trained on (same classes)."""
    cache: str | None = None
    """Other feature cache made with the run's settings, or none: a frozen pass for every batch."""
    backbone: str | None = None
    """With a frozen pass: where the frozen model is now, if not where it was."""
    checkpoint_path: Path | None = None
    """With a frozen pass: weights for a timm model name."""
    attention: Attention = "auto"
    """With a frozen pass: implementation of its attention (fpt-fast info lists them)."""
    device: Device = "auto"
    """Where it runs."""
    batch_size: int = 16
    """Images per step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictSettings:
    """Classify images with a trained run; needs no cache."""

    run: Path
    """Directory of the run."""
    images: tuple[Path, ...]
    """Images, folders or a CSV list with a path column."""
    output: Path
    """CSV file to write: path, predicted class, one probability per class."""
    backbone: str | None = None
    """Where the frozen model is now, if not where it was (its weights are checked)."""
    checkpoint_path: Path | None = None
    """Weights for a timm model name, instead of downloading them."""
    skip_unreadable: bool = False
    """Go on without images that cannot be decoded."""
    dtype: Dtype = "auto"
    """Arithmetic of the frozen pass (auto: that of the run's features)."""
    attention: Attention = "auto"
    """Implementation of its attention (fpt-fast info lists them); they differ by rounding only."""
    device: Device = "auto"
    """Where it runs."""
    batch_size: int = 8
    """Images per frozen pass."""
    workers: int = dataclasses.field(default_factory=_default_workers)
    """Threads that decode images."""


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
        # A run's own config.yaml: what was asked for is in this block.
        values = values["settings"]
    return parse_values(settings, values, str(path))


def parse_values(settings: type[Any], values: Any, where: str) -> dict[str, Any]:
    """Check keys and types of ``values`` read from ``where`` against the fields of ``settings``."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} must hold keys and values, got {type(values).__name__}")
    known = {field.name for field in dataclasses.fields(settings)}
    renamed = {str(key).replace("-", "_"): value for key, value in values.items()}
    unknown = sorted(set(renamed) - known)
    if unknown:
        raise ConfigError(
            f"{where}: unknown key {', '.join(map(repr, unknown))}; known are "
            f"{', '.join(sorted(known))}"
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
            f"{settings.__name__} has no {', '.join(map(repr, unknown))}; known are "
            f"{', '.join(sorted(hints))}"
        )
    return settings(**{name: _as_path(value, hints[name]) for name, value in values.items()})


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
