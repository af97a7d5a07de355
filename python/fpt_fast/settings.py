"""Settings of each command: what the user may say by flag, YAML or keyword argument.

Every field is a command-line flag of the same name (``input_size`` is ``--input-size``) and a
key of a YAML file; the text below a field is its help text.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fpt_fast.config import AnyMethod, Loss, LossWeight, Method, Precision
from fpt_fast.records import Attention, FeatureDtype, Fit, GradeCuts, Importance, Split, Views

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


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
class ShareSettings:
    """Hand a run's best model on: a folder with model, metrics and card, and the hub."""

    run: Path
    """Folder of a finished run."""
    output: Path | None = None
    """New folder for the files."""
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
    """Loss; the square, absolute and smooth ones treat the label as a grade with one output; with
    several findings per image cross_entropy and focal are those of each finding; with
    --value-column cross_entropy stands for mean_square_error."""
    loss_weight: LossWeight = "none"
    """Class weights of the cross-entropy (of findings: weights of the images that have them)."""
    loss_weights: tuple[float, ...] = ()
    """One weight per class, with --loss-weight given."""
    grade_cuts: GradeCuts = "kappa"
    """With a loss of grades: what the cut points between them are chosen for on the validation
    images (quadratic kappa, or accuracy), or halves to leave them at 0.5, 1.5, ..."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """balanced: an epoch draws as many images as there are, each class (finding) alike often."""
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
    features_on: Literal["auto", "resident", "pinned", "disk"] = "auto"
    """Where a cache's features are during training on a GPU: in its memory, in pinned memory of
    the host, or read ahead from the disk (auto: the first that fits); a CPU reads them in place."""
    precision: Precision = "float32"
    """Arithmetic of the training step's matrix products; weights and optimiser stay in float32
    (a sweep takes float32 and bfloat16)."""
    deterministic: bool = False
    """Refuse operations that may give other bits in a rerun (a CPU needs no telling)."""
    report_thumbnails: int = 200
    """Images that the report's table of predictions shows small, the worst first."""
    report_images: int = 6
    """Test images drawn in the report with their kept tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings(RunSettings):
    """Train the prompts and the side network from a feature cache, then test the best epoch; or
    train by one of the methods that FPT is compared with, which needs no cache."""

    method: AnyMethod = "fpt_plus"
    """FPT+ or FPT; or full fine-tuning, linear probing, visual prompt tuning, attention tuning,
    adapter, BitFit, LoRA, ladder side-tuning, on images at full resolution (docs/methods.md)."""
    cache: str = ""
    """Directory of the feature cache, or none: a frozen pass for every batch instead.  FPT and
    FPT+ need one of the two; the other methods have none."""
    rank: int | None = None
    """With --method lora: rank of the updates (default 16)."""
    lora_targets: Literal["qkv", "attention"] | None = None
    """With --method lora: what is updated, the projection to query, key and value (qkv, the
    default), or that of the output as well (attention)."""
    bottleneck: int | None = None
    """With --method adapter: width of the adapters (default 48)."""
    adapter_places: Literal["both", "mlp"] | None = None
    """With --method adapter: behind attention and MLP of each layer (both, the default), or mlp."""
    prompt_depth: Literal["deep", "shallow"] | None = None
    """With --method prompt: prompts in front of every layer (deep, the default), or the first."""
    side_init: Literal["pruned", "random"] | None = None
    """With --method side: where its weights begin (default: as the frozen model's, pruned)."""
    gradient_checkpointing: bool = False
    """With the methods other than FPT: compute activations again instead of keeping them."""
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
    step: Literal["auto", "graph", "eager"] = "auto"
    """graph: each training step is one launch on a GPU; eager: operation by operation; auto: the
    former where it can be and is proven."""
    profile_steps: str | None = None
    """Steps to capture in Nsight, like 20:30 (see docs/profiling.md)."""
    tensorboard: bool = False
    """Write TensorBoard files into the run (needs the tensorboard extra)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSettings(RunSettings):
    """Train many models side by side on one stream of features, all combinations of what is
    listed; each ends up in a folder of its own, as if trained alone."""

    method: Method = "fpt_plus"
    """FPT+ or FPT."""
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
    folds: int | None = None
    """Cross-validation: the sweep once for each of so many folds of the data, on one cache."""
    repeats: int = 1
    """Divisions into --folds, from --split-seed on."""
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
    """Directory of the run."""
    output: Path
    """CSV file to write: path, predicted class, one probability per class."""
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
    calibrated: bool = False
    """Give probabilities at the temperature of the validation images, as predict --calibrated."""
