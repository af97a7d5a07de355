"""The authors' Hydra configurations, read without Hydra, into ours."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fpt_fast.compat.hydra_files import ReferenceConfigError, compose
from fpt_fast.config import AugmentConfig, FptConfig, Loss, LossWeight, TrainConfig, parse_layers

_MISSING = "???"

_LOSSES: dict[str, Loss] = {
    "cross_entropy": "cross_entropy",
    "focal_loss": "focal",
    "kappa_loss": "kappa",
    "mean_square_error": "mean_square_error",
    "mean_absolute_error": "mean_absolute_error",
    "smooth_L1": "smooth_l1",
}
_MONITORS = {
    "acc": "accuracy",
    "f1": "f1",
    "auc": "auc",
    "precision": "precision",
    "recall": "recall",
    "kappa": "kappa",
}
_OPTIMIZERS = {"ADAMW": "adamw", "ADAM": "adam", "SGD": "sgd"}

# Keys that say how their script runs, not what it computes; ours has flags of its own for them.
_RUN_KEYS = {
    "base": ("device", "cudnn_deterministic", "overwrite", "progress", "checkpoint"),
    "dataset": ("name",),
    "train": ("num_workers", "metrics", "save_interval", "sample_view", "pin_memory"),
}
# Their config offers these; their code applies only flip, colour and crop.
_NEVER_APPLIED = ("vertical_flip", "rotation", "translation", "grayscale", "gaussian_blur")

_ALWAYS = (
    "the last batch of an epoch: theirs is dropped where it is not full (drop_last=True), ours is "
    "trained on",
    "the test images are resized by Pillow there and by torchvision's antialiased bilinear filter "
    "here: pixels differ by rounding",
    "AUC is computed on raw logits there, on probabilities here (compare with auc_raw_logits)",
    "the best epoch is lost there when the metric is never above 0 or after a resume, never here",
)


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """What a configuration of the authors' code says, in our terms.

    ``input_size`` is the frozen model's (height, width); ``mean`` and ``std`` are per channel of
    values in [0, 1], or None where theirs says ``auto``; ``num_classes`` and the paths are None
    where theirs leaves them out.  ``notes`` say, in words for a user, everything that differs or
    was not understood.
    """

    method: FptConfig
    train: TrainConfig
    augment: AugmentConfig
    backbone: str
    input_size: tuple[int, int]
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None
    num_classes: int | None
    data_path: str | None
    preload_path: str | None
    save_path: str | None
    notes: tuple[str, ...]


def read_reference_config(path: str | Path, overrides: Sequence[str] = ()) -> ReferenceSettings:
    """Read the ``cfg.yaml`` that their training writes, or their folder ``configs``.

    ``overrides`` are those of their command line: ``"network=FPT"``, ``"dataset=ddr"``,
    ``"++train.batch_size=4"``.  Raises ``ReferenceConfigError`` (a ``ValueError``) where a value
    is missing or cannot work, ``ConfigError`` where ours cannot hold it; a key that their code
    does not know is no error but a note.
    """
    values = _Values(compose(Path(path), overrides))
    notes = list(_ALWAYS)
    method = _read_method(values, notes)
    train = _read_train(values, notes)
    augment = _read_augmentation(values, notes)
    mean, std = (_read_statistic(values, name, notes) for name in ("mean", "std"))
    size = int(values.take("dataset.input_size"))
    num_classes = values.take("dataset.num_classes", None)
    settings = ReferenceSettings(
        method=method,
        train=train,
        augment=augment,
        backbone=str(values.take("network.pretrained_path")),
        input_size=(size, size),
        mean=mean,
        std=std,
        num_classes=None if num_classes is None else int(num_classes),
        data_path=values.take("dataset.data_path", None),
        preload_path=values.take("dataset.preload_path", None),
        save_path=values.take("dataset.save_path", None),
        notes=(),
    )
    for group, names in _RUN_KEYS.items():
        for name in names:
            values.take(f"{group}.{name}", None)
    notes += [f"{key} is not a key that the authors' code reads" for key in values.left()]
    return replace(settings, notes=tuple(notes))


def _read_method(values: "_Values", notes: list[str]) -> FptConfig:
    side_reduction = int(values.take("network.side_reduction_ratio"))
    prompt_reduction = int(values.take("network.prompt_reduction_ratio"))
    if prompt_reduction not in (1, side_reduction):
        raise ReferenceConfigError(
            "network.prompt_reduction_ratio must be 1 (prompts as wide as the frozen model) or "
            f"network.side_reduction_ratio {side_reduction} (as wide as the side network), "
            f"got {prompt_reduction}"
        )
    text = values.take("network.layers_to_extract")
    layers = _read_layers(text)
    if isinstance(text, str) and "," in text and list(layers) != _numbers(text):
        notes.append(f"network.layers_to_extract {text!r} is taken in ascending order, as there")
    side = int(values.take("network.side_input_size"))
    importance = str(values.take("network.token_imp"))
    if importance not in ("global", "class_token"):
        raise ReferenceConfigError(
            f"network.token_imp must be 'global' or 'class_token', got {importance!r}"
        )
    is_plus = prompt_reduction == 1
    return FptConfig(
        method="fpt_plus" if is_plus else "fpt",
        layers=layers,
        token_ratio=float(values.take("network.token_ratio")),
        importance=importance,  # type: ignore[arg-type]
        num_prompts=int(values.take("network.num_prompts")),
        prompt_dim="frozen" if is_plus else "side",
        prompt_norm=_boolean(values, "network.prompt_norm"),
        prompt_proj=_boolean(values, "network.prompt_proj"),
        side_reduction=side_reduction,
        side_size=(side, side),
    )


def _read_layers(text: object) -> tuple[int, ...]:
    if isinstance(text, str) and "," in text and "-" not in text:
        return tuple(sorted(set(_numbers(text))))
    return parse_layers(str(text))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ReferenceConfigError(
            f"network.layers_to_extract must be like '6-11' or '0,2,5', got {text!r}"
        ) from None


def _read_train(values: "_Values", notes: list[str]) -> TrainConfig:
    criterion = _one_of(values, "train.criterion", _LOSSES)
    indicator = _one_of(values, "train.indicator", _MONITORS)
    optimizer = _one_of(values, "solver.optimizer", _OPTIMIZERS)
    loss_weight, loss_weights = _read_loss_weight(values, criterion, notes)
    decay = float(values.take("train.loss_weight_decay_rate", 0))
    momentum = values.take("solver.momentum", None)
    values.take("solver.nesterov", None)
    seed = int(values.take("base.random_seed", -1))
    if seed < 0:
        notes.append(
            "base.random_seed is negative, which seeds nothing there; ours is seeded with 0"
        )
    if values.take("base.seed", None) is not None:
        notes.append(
            "base.seed is what the authors' README documents, but their code never reads it; "
            "nor is it read here: set base.random_seed"
        )
    if criterion == "kappa":
        notes.append(
            "kappa_loss cannot be built there (its class count is not passed); ours takes soft "
            "predictions from a softmax, not from squared outputs"
        )
    changes: dict[str, Any] = {}
    if optimizer != "sgd":
        changes["betas"] = tuple(float(beta) for beta in values.take("solver.betas"))
    elif momentum is not None:
        changes["momentum"] = float(momentum)
        notes.append(
            "SGD takes Nesterov's momentum there (whatever solver.nesterov says), plain here"
        )
    return TrainConfig(
        epochs=int(values.take("train.epochs")),
        batch_size=int(values.take("train.batch_size")),
        learning_rate=float(values.take("dataset.learning_rate")),
        optimizer=optimizer,
        weight_decay=float(values.take("solver.weight_decay")),
        warmup_epochs=int(values.take("train.warmup_epochs", 0)),
        loss=criterion,
        loss_weight=loss_weight,
        loss_weights=loss_weights,
        loss_weight_decay=decay,
        monitor=indicator,
        eval_interval=int(values.take("train.eval_interval", 1)),
        seed=max(seed, 0),
        **changes,
    )


def _read_loss_weight(
    values: "_Values", criterion: Loss, notes: list[str]
) -> tuple[LossWeight, tuple[float, ...]]:
    given = values.take("train.loss_weight", None)
    if given is None:
        return "none", ()
    if criterion != "cross_entropy":
        notes.append(f"train.loss_weight {given!r} goes with cross_entropy only, there as here")
        return "none", ()
    if isinstance(given, list):
        # Their test for a plain list fails on the list type that Hydra gives.
        notes.append("train.loss_weight as a list is silently ignored there; it is used here")
        return "given", tuple(float(weight) for weight in given)
    if given not in ("balance", "dynamic"):
        raise ReferenceConfigError(
            f"train.loss_weight must be null, 'balance', 'dynamic' or a list, got {given!r}"
        )
    return given, ()


def _read_augmentation(values: "_Values", notes: list[str]) -> AugmentConfig:
    group = "data_augmentation_args"
    flip = float(values.take(f"{group}.horizontal_flip.prob", 0.5))
    jitter = {
        name: float(values.take(f"{group}.color_distortion.{name}", default))
        for name, default in (
            ("prob", 1.0),
            ("brightness", 0.2),
            ("contrast", 0.2),
            ("saturation", 0.0),
            ("hue", 0.0),
        )
    }
    crop = float(values.take(f"{group}.random_crop.prob", 1.0))
    area = values.take(f"{group}.random_crop.scale", [0.8, 1.0])
    ratio = values.take(f"{group}.random_crop.ratio", [0.7, 1.3])
    for name in ("saturation", "hue"):
        if jitter[name]:
            notes.append(
                f"{group}.color_distortion.{name} {jitter[name]} is not offered here: not applied"
            )
    for name, probability in (("color_distortion", jitter["prob"]), ("random_crop", crop)):
        if probability != 1.0:
            notes.append(f"{group}.{name}.prob {probability} is not offered here: always applied")
    for name in _NEVER_APPLIED:
        if values.drop(f"{group}.{name}"):
            notes.append(f"{group}.{name} is never applied by the authors' code, nor here")
    values.take(f"{group}.value_fill", None)
    return AugmentConfig(
        horizontal_flip=flip,
        brightness=jitter["brightness"],
        contrast=jitter["contrast"],
        crop_area=(float(area[0]), float(area[1])),
        crop_ratio=(float(ratio[0]), float(ratio[1])),
    )


def _read_statistic(
    values: "_Values", name: str, notes: list[str]
) -> tuple[float, float, float] | None:
    given = values.take(f"dataset.{name}")
    if given == "auto":
        notes.append(
            f"dataset.{name} is 'auto': measured on the training images here; their preload "
            "cannot run with it"
        )
        return None
    if not isinstance(given, list) or len(given) != 3:
        raise ReferenceConfigError(
            f"dataset.{name} must be 'auto' or a list of three numbers, got {given!r}"
        )
    red, green, blue = (float(number) for number in given)
    return (red, green, blue)


def _one_of(values: "_Values", key: str, known: Mapping[str, Any]) -> Any:
    given = values.take(key)
    if given not in known:
        raise ReferenceConfigError(f"{key} must be one of {', '.join(known)}, got {given!r}")
    return known[given]


def _boolean(values: "_Values", key: str) -> bool:
    given = values.take(key)
    if not isinstance(given, bool):
        raise ReferenceConfigError(f"{key} must be true or false, got {given!r}")
    return given


_REQUIRED = object()


class _Values:
    """A tree of values that remembers what was taken of it."""

    def __init__(self, tree: dict[str, Any]) -> None:
        self._tree = tree

    def take(self, key: str, default: Any = _REQUIRED) -> Any:
        """Remove and return the value at a dotted key; missing or ``???`` gives the default."""
        *groups, name = key.split(".")
        branch: Any = self._tree
        for group in groups:
            branch = branch.get(group) if isinstance(branch, dict) else None
        value = branch.pop(name, _MISSING) if isinstance(branch, dict) else _MISSING
        if isinstance(value, str) and value == _MISSING:
            if default is _REQUIRED:
                raise ReferenceConfigError(f"{key} must be set, got nothing (or ???)")
            return default
        return value

    def drop(self, key: str) -> bool:
        """Remove what is at a dotted key; whether there was anything."""
        return self.take(key, None) is not None

    def left(self) -> list[str]:
        """Dotted keys of all values that nobody took."""
        return sorted(_leaves(self._tree))


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, value in tree.items():
        key = f"{prefix}{name}"
        found += _leaves(value, key + ".") if isinstance(value, dict) else [key]
    return found
