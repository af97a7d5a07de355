"""Configuration of method and training: presets, validation with reasons, JSON round trip."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeVar, get_args

from fpt_fast.records import BackboneSpec, Importance

_T = TypeVar("_T")

Method = Literal["fpt_plus", "fpt"]
METHODS: tuple[Method, ...] = ("fpt_plus", "fpt")

# The methods that the papers compare with; fpt_fast.peers has one file each.
PeerMethod = Literal["full", "linear", "prompt", "attention", "adapter", "bitfit", "lora", "side"]
PEER_METHODS: tuple[PeerMethod, ...] = get_args(PeerMethod)
AnyMethod = Literal[Method, PeerMethod]

Loss = Literal[
    "cross_entropy",
    "focal",
    "kappa",
    "mean_square_error",
    "mean_absolute_error",
    "smooth_l1",
    "binary_cross_entropy",
    "binary_focal",
]
REGRESSION_LOSSES: tuple[Loss, ...] = ("mean_square_error", "mean_absolute_error", "smooth_l1")

# Of several findings per image, each with an output of its own.
FINDING_LOSSES: tuple[Loss, ...] = ("binary_cross_entropy", "binary_focal")

LossWeight = Literal["none", "balance", "dynamic", "given"]
Precision = Literal["float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16", "float16")


class ConfigError(ValueError):
    """A configuration that cannot work; says what was expected, what came, what to do."""


@dataclass(frozen=True, slots=True)
class FptConfig:
    """The method's own choices (DESIGN.md section 2); ``fpt_plus()`` and ``fpt()`` are the presets.

    ``layers``: extracted layers, 0-based and ascending, or None for the method's own (FPT+: the
    last half of the frozen model; FPT: all).  ``side_size``: (height, width) of the side input in
    pixels.  ``prompt_dim``: width of the prompts, ``"frozen"`` (C) or ``"side"`` (S).
    ``fusion`` False leaves the side network alone (the papers' first ablation row).
    """

    method: Method = "fpt_plus"
    layers: tuple[int, ...] | None = None
    token_ratio: float = 0.2
    importance: Importance = "global"
    num_prompts: int = 16
    prompt_dim: Literal["frozen", "side"] = "frozen"
    prompt_norm: bool = True
    prompt_proj: bool = False
    side_reduction: int = 8
    side_size: tuple[int, int] = (128, 128)
    fusion: bool = True
    fusion_dropout: float = 0.5
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        require(self.method in METHODS, "method", f"one of {', '.join(METHODS)}", self.method)
        require(
            0.0 < self.token_ratio <= 1.0, "token_ratio", "above 0 and at most 1", self.token_ratio
        )
        require(
            self.importance in ("global", "class_token"),
            "importance",
            "'global' or 'class_token'",
            self.importance,
        )
        require(self.num_prompts >= 1, "num_prompts", "at least 1", self.num_prompts)
        require(
            self.prompt_dim in ("frozen", "side"),
            "prompt_dim",
            "'frozen' or 'side'",
            self.prompt_dim,
        )
        require(
            self.prompt_proj or self.prompt_dim == "frozen",
            "prompt_proj",
            "True when prompt_dim is 'side' (prompts must be projected to the frozen width)",
            self.prompt_proj,
        )
        require(self.side_reduction >= 1, "side_reduction", "at least 1", self.side_reduction)
        require(
            len(self.side_size) == 2 and min(self.side_size) >= 1,
            "side_size",
            "(height, width), both at least 1",
            self.side_size,
        )
        require(
            0.0 <= self.fusion_dropout < 1.0, "fusion_dropout", "in [0, 1)", self.fusion_dropout
        )
        if self.layers is not None:
            require(len(self.layers) >= 1, "layers", "at least one layer", self.layers)
            require(
                list(self.layers) == sorted(set(self.layers)) and self.layers[0] >= 0,
                "layers",
                "ascending, without repeats, none below 0",
                self.layers,
            )

    def resolve_layers(self, depth: int) -> tuple[int, ...]:
        """Extracted layers on a frozen model of ``depth`` layers; refuses those it lacks."""
        if self.layers is None:
            return tuple(range(depth // 2 if self.method == "fpt_plus" else 0, depth))
        if self.layers[-1] >= depth:
            raise ConfigError(
                f"layers must be below {depth}, the depth of the frozen model, got "
                f"{format_layers(self.layers)}; name layers between 0 and {depth - 1}"
            )
        return self.layers

    def check_against(self, spec: BackboneSpec) -> None:
        """Raise ``ConfigError`` where this method cannot work on that frozen model."""
        self.resolve_layers(spec.depth)
        if spec.hidden_size % self.side_reduction:
            raise ConfigError(
                f"side_reduction must divide the frozen width {spec.hidden_size}, "
                f"got {self.side_reduction}"
            )
        width = spec.hidden_size // self.side_reduction
        if width % spec.num_heads:
            raise ConfigError(
                f"the side width {spec.hidden_size}/{self.side_reduction} = {width} must be a "
                f"multiple of the frozen model's {spec.num_heads} heads; choose a smaller "
                "side_reduction"
            )
        check_divides("side_size", self.side_size, spec.patch_size)
        if self.importance == "class_token" and not spec.has_class_token:
            raise ConfigError(
                f"importance='class_token' needs a class token, which {spec.name} has not; "
                "use importance='global'"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``from_json`` gives an equal configuration back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``to_json``; an unknown key is an error."""
        return from_mapping(cls, values)


def fpt_plus(**changes: Any) -> FptConfig:
    """FPT+ as published (TNNLS 2025), with ``changes`` by field name."""
    return from_mapping(FptConfig, {"method": "fpt_plus", **changes})


def fpt(**changes: Any) -> FptConfig:
    """FPT as published (MICCAI 2024), with ``changes`` by field name."""
    published: dict[str, Any] = {
        "method": "fpt",
        "prompt_dim": "side",
        "prompt_norm": False,
        "prompt_proj": True,
        "side_size": (224, 224),
    }
    return from_mapping(FptConfig, {**published, **changes})


def preset(method: str, **changes: Any) -> FptConfig:
    """The published configuration of ``method``, with ``changes`` by field name."""
    if method == "fpt_plus":
        return fpt_plus(**changes)
    if method == "fpt":
        return fpt(**changes)
    raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """Augmentation of the side input; the defaults are those of the published recipe."""

    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    brightness: float = 0.2
    contrast: float = 0.2
    crop_area: tuple[float, float] = (0.8, 1.0)
    crop_ratio: tuple[float, float] = (0.7, 1.3)

    def __post_init__(self) -> None:
        for name in ("horizontal_flip", "vertical_flip"):
            require(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]", getattr(self, name))
        for name in ("brightness", "contrast"):
            require(0.0 <= getattr(self, name) <= 1.0, name, "in [0, 1]", getattr(self, name))
        for name, top in (("crop_area", 1.0), ("crop_ratio", float("inf"))):
            low, high = getattr(self, name)
            require(0.0 < low <= high <= top, name, f"0 < low <= high <= {top}", (low, high))


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """The training recipe; the defaults are the published one.

    ``learning_rate`` per step follows a half cosine to 0 after ``warmup_epochs`` of linear
    warm-up.  ``loss_weights`` goes with ``loss_weight="given"``; ``loss_weight_decay`` with
    ``"dynamic"`` (weights move from balanced to equal by this factor per epoch).
    ``target`` is mean and standard deviation of the training images' numbers, where labels are
    such: the model learns the number less the mean, over the deviation.
    ``monitor`` is the validation metric that picks the best epoch.  ``precision`` is that of the
    training step's matrix products; weights and optimiser are in f32 whatever it is.
    """

    epochs: int = 20
    batch_size: int = 16
    learning_rate: float = 1e-4
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    warmup_epochs: int = 0
    loss: Loss = "cross_entropy"
    loss_weight: LossWeight = "none"
    loss_weights: tuple[float, ...] = ()
    loss_weight_decay: float = 0.9
    target: tuple[float, float] | None = None
    monitor: str = "auc"
    eval_interval: int = 1
    seed: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "eval_interval"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("learning_rate", "clip_norm"):
            require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        known = f"one of {', '.join(PRECISIONS)}"
        require(self.precision in PRECISIONS, "precision", known, self.precision)
        require(self.weight_decay >= 0, "weight_decay", "at least 0", self.weight_decay)
        require(self.warmup_epochs >= 0, "warmup_epochs", "at least 0", self.warmup_epochs)
        require(
            (self.loss_weight == "given") == bool(self.loss_weights),
            "loss_weights",
            "one weight per class together with loss_weight='given', and none otherwise",
            self.loss_weights,
        )
        if self.target is not None:
            require(
                self.is_regression and len(self.target) == 2 and self.target[1] > 0,
                "target",
                f"(mean, deviation above 0), with a loss of {', '.join(REGRESSION_LOSSES)}",
                self.target,
            )
        weighted = ("cross_entropy", "binary_cross_entropy")
        if self.loss_weight != "none" and self.loss not in weighted:
            raise ConfigError(
                f"loss_weight={self.loss_weight!r} goes with loss='cross_entropy', "
                f"got loss={self.loss!r}"
            )

    @property
    def is_regression(self) -> bool:
        """True where the model has one output and the label is a grade."""
        return self.loss in REGRESSION_LOSSES

    @property
    def has_findings(self) -> bool:
        """True where an image may have several findings, each with an output of its own."""
        return self.loss in FINDING_LOSSES

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``from_json`` gives an equal configuration back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``to_json``; an unknown key is an error."""
        return from_mapping(cls, values)


def parse_layers(text: str) -> tuple[int, ...]:
    """Read layers written as ``"6-11"``, ``"0,2,5"`` or both mixed; ascending, 0-based."""
    layers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low = int(first)
            high = int(last) if dash else low
        except ValueError:
            raise ConfigError(
                f"layers must be written like '6-11' or '0,2,5', got {text!r}"
            ) from None
        if high < low:
            raise ConfigError(f"layers must ascend, got {part.strip()!r} in {text!r}")
        layers.extend(range(low, high + 1))
    if layers != sorted(set(layers)) or layers[0] < 0:
        raise ConfigError(f"layers must be ascending and without repeats, got {text!r}")
    return tuple(layers)


def format_layers(layers: tuple[int, ...]) -> str:
    """Write layers as ``parse_layers`` reads them, runs as ``6-11``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def check_divides(name: str, size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise ``ConfigError`` unless ``patch`` (height, width) tiles an input of ``size``."""
    if size[0] % patch[0] or size[1] % patch[1] or min(size) <= 0:
        near = tuple(max(p, round(s / p) * p) for s, p in zip(size, patch, strict=True))
        raise ConfigError(
            f"{name} must be a multiple of the patch size {patch[0]}x{patch[1]}, got "
            f"{size[0]}x{size[1]}; the nearest that works is {near[0]}x{near[1]}"
        )


def require(holds: bool, name: str, expected: str, got: object) -> None:
    """Raise ``ConfigError`` unless it ``holds`` that the setting ``name`` is as expected."""
    if not holds:
        raise ConfigError(f"{name} must be {expected}, got {got!r}")


def from_mapping(cls: type[_T], values: Mapping[str, Any]) -> _T:
    """Make a configuration of ``values`` by field name; an unknown name is an error."""
    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(
            f"unknown key {', '.join(map(repr, unknown))} for {cls.__name__}; "
            f"known are {', '.join(sorted(known))}"
        )
    # JSON and YAML know lists, not tuples.
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
