"""Settings of training and of sweeps of trainings (see ``settings``)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fpt_fast.config import AnyMethod, Loss, LossWeight, Method, Precision
from fpt_fast.records import Attention, FeatureDtype, Fit, GradeCuts, Importance
from fpt_fast.settings import BackboneSettings, Device, Dtype, PositionInterpolation


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings(BackboneSettings):
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
    """Share of tokens kept (default 0.2); with a cache, must be the one it was made with."""
    importance: Importance | None = None
    """Token importance (default global); with a cache, must be the one it was made with."""
    input_size: str | None = None
    """Input of the frozen model (default 512); with a cache, must be the one it was made with."""
    features: FeatureDtype | None = None
    """What features are kept in (default float16); with a cache, must be what it has."""
    backbone: str | None = None
    """Frozen model; needed with --cache none, else must be the one the cache was made with."""
    normalization: str | None = None
    """As preload takes it (default auto); with a cache, must be what it was made with."""
    mean: tuple[float, float, float] | None = None
    """Channel means in [0, 1]; with a cache, must be those it was made with."""
    std: tuple[float, float, float] | None = None
    """Channel standard deviations in [0, 1]; with a cache, must be those it was made with."""
    fit: Fit | None = None
    """stretch (default) or pad; with a cache, must be the one it was made with."""
    window: str | None = None
    """Window of grey images (default file); with a cache, must be the one it was made with."""
    dicom_frame: int | None = None
    """Frame of DICOM files of several; with a cache, must be the one it was made with."""
    position_interpolation: PositionInterpolation | None = None
    """timm (default) or bicubic_scale; with a cache, must be the one it was made with."""
    dtype: Dtype | None = None
    """Arithmetic of a frozen pass (default auto); with a cache, must be what it was made in."""
    attention: Attention = "auto"
    """With a frozen pass: implementation of its attention (fpt-fast info lists them)."""
    device: Device = "auto"
    """Where training, and a frozen pass, runs."""
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
