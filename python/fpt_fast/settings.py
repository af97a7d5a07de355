"""Settings of each command: what the user may say by flag, YAML or keyword argument.

Every field is a command-line flag of the same name (``input_size`` is ``--input-size``) and a
key of a YAML file; the text below a field is its help text.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fpt_fast.records import Attention, FeatureDtype, Fit, Importance, Split, Views

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PositionInterpolation = Literal["timm", "bicubic_scale"]


def _default_workers() -> int:
    return max(1, min(8, os.cpu_count() or 1))


@dataclass(frozen=True, kw_only=True, slots=True)
class ListingSettings:
    """How the images of a data set are listed and split."""

    split_ratios: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Shares of train, val and test where the data brings no splits; stratified by class."""
    split_seed: int = 0
    """Seed of that split."""
    path_column: str = "path"
    """CSV column of the image path, relative to the CSV file."""
    label_column: str = "label"
    """CSV column of the class."""
    class_order: tuple[str, ...] = ()
    """All classes in their order, where they are grades with names: none mild severe (default: by
    number if all are integers, else by name)."""
    label_columns: tuple[str, ...] = ()
    """Instead of a class, several findings per image: CSV columns of 1 and 0 (-1: unknown)."""
    value_column: str | None = None
    """Instead of a class, a number per image (an age, a pressure): CSV column of it."""
    blank_findings: Literal["unknown", "absent"] = "unknown"
    """What an empty cell of these columns means; what is unknown counts in no loss or metric."""
    split_column: str = "split"
    """CSV column of the split (train, val, test), if there is one."""
    patient_column: str | None = None
    """CSV column of the patient: no patient's images stand on two sides of a split."""
    fold: str | None = None
    """Test on one of several equal parts of all images, as 2/5; val is taken from the rest."""
    patient_pattern: str | None = None
    """Instead of a column, a regular expression whose one group finds the patient in a path."""
    skip_unreadable: bool = False
    """Go on without images that cannot be decoded (they are listed either way)."""
    workers: int = dataclasses.field(default_factory=_default_workers)
    """Threads that decode images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoctorSettings(ListingSettings):
    """Look for leaks between splits, copies, damage, odd sizes, imbalance; and say what to do."""

    data: Path | None = None
    """Data set to look at (default: that of --run)."""
    cache: Path | None = None
    """Feature cache to look at, and to compare with the data (default: that of --run)."""
    run: Path | None = None
    """Run folder to look at; its own settings tell how its data were listed."""
    input_size: str | None = None
    """Frozen input that the images are meant for: 512 or HEIGHTxWIDTH (default: the cache's)."""
    fit: Fit | None = None
    """How they are brought to it: stretch or pad (default: as the cache has it, else stretch)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings(ListingSettings):
    """Where the images are and how they are split."""

    data: Path
    """Folder (train/val/test/class, or class) or CSV list (path, label[, split])."""


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
class ReadingSettings(InputSettings):
    """How image files are read and fitted to the input."""

    fit: Fit = "stretch"
    """stretch images to the input's shape, as published, or pad them to it with black."""
    window: str = "file"
    """Grey of more than 8 bits: file (DICOM's own window), full (nothing is cut), minmax (of each
    image), or CENTRE/WIDTH like 40/400."""
    dicom_frame: int | None = None
    """Frame of DICOM files of several frames, from 1 (without it they are refused)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FrozenSettings(ReadingSettings):
    """How the frozen pass runs."""

    position_interpolation: PositionInterpolation = "timm"
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
class ShareSettings:
    """Hand a run's best model on: a folder with model, metrics and card, and the hub."""

    run: Path
    """Folder of a finished run."""
    output: Path | None = None
    """New folder for the files."""
    overwrite: bool = False
    """Replace what was shared into it before."""
    repo: str | None = None
    """Repository of the Hugging Face hub, OWNER/NAME, made where there is none."""
    private: bool = True
    """Make a new repository private."""
    name: str = ""
    """Title of the card (default: the name of the run's folder)."""
    data_set: str = ""
    """What the model was trained and tested on, in your words."""
    license: str = ""
    """Licence of the model, an identifier such as apache-2.0."""
    intended_use: str = ""
    """What the model is for, in your words."""
    contact: str = ""
    """Whom to ask."""


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
    resamples: int = 2000
    """Bootstrap resamples behind the confidence intervals (0: no intervals)."""
    level: float = 0.95
    """Level of the confidence intervals."""
    interval: Literal["percentile", "bca"] = "percentile"
    """Kind of the confidence intervals: quantiles, or bias-corrected and accelerated."""
    at_specificity: tuple[float, ...] = (0.9,)
    """Specificities at which the sensitivity is given, by thresholds from the validation images."""
    at_sensitivity: tuple[float, ...] = (0.9,)
    """Sensitivities at which the specificity is given."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineSettings:
    """How a trained run is applied to image files, by a frozen pass and without a cache."""

    images: tuple[Path, ...]
    """Images, folders or a CSV list with a path column."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSettings:
    """Export a trained run, frozen model included, as one file for other programs."""

    run: Path
    """Directory of the run."""
    output: Path
    """File to write: MODEL.onnx or MODEL.pt2."""
    format: Literal["onnx", "program"] = "onnx"
    """onnx (needs the export extra), or a program of torch.export."""
    overwrite: bool = False
    """Replace a file that is there."""
    calibrated: bool = False
    """Give probabilities at the temperature of the validation images (each finding at its own), as
    predict --calibrated does."""
    backbone: str | None = None
    """Where the frozen model is now, if not where it was (its weights are checked)."""
    checkpoint_path: Path | None = None
    """Weights for a timm model name, instead of downloading them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictSettings(OnlineSettings):
    """Classify images with a trained run; needs no cache."""

    run: Path
    """Directory of the run; a sweep's folder stands for all its models, averaged."""
    output: Path
    """CSV file to write: path, predicted class, one probability per class."""
    overwrite: bool = False
    """Replace a file that is there."""
    ensemble: tuple[Path, ...] = ()
    """More runs, whose probabilities are averaged with the first one's; a sweep's folder stands
    for all its models. One frozen pass serves them all."""
    tta: Views = "one"
    """Views averaged: one, side (the side input mirrored too, without another frozen pass), or
    both (the whole image mirrored too)."""
    calibrated: bool = False
    """Scale logits by the temperature of the run's validation images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainSettings(OnlineSettings):
    """Show for images which tokens were kept and where the prompts of a trained run look."""

    run: Path
    """Directory of the run."""
    output: Path | None
    """Folder for pictures, arrays and explanations.csv (from Python also None, for none)."""
    overwrite: bool = False
    """Replace an earlier run's, all of them."""
    calibrated: bool = False
    """Give probabilities at the temperature of the validation images, as predict --calibrated."""
