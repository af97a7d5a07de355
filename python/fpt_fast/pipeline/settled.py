"""What a feature cache has settled: what a run may still say of it, and what it says in the end."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from fpt_fast.backbone import BackboneError, backbone_name
from fpt_fast.cache import CacheMismatch
from fpt_fast.config import ConfigError, format_layers, parse_layers
from fpt_fast.images import dataset_preset, preset_names
from fpt_fast.pipeline.features import FeaturePlan
from fpt_fast.pipeline.peer_plan import PeerPlan
from fpt_fast.run_settings import RunSettings
from fpt_fast.setting_values import parse_size
from fpt_fast.settings import FrozenSettings

_Run = TypeVar("_Run", bound=RunSettings)


def refuse_ignored(settings: RunSettings) -> None:
    """A setting that would do nothing must not look as if it did something."""
    if settings.cache == "none":
        if settings.features_on != "auto":
            raise ConfigError(
                "--features-on: goes with a cache only, got --cache none; leave it out"
            )
    elif settings.augment_input:
        raise ConfigError(
            "--augment-input: with a cache this is settled, its features are of images as they "
            "are: leave it out (training takes it with --cache none only)"
        )


def frozen_settings(settings: RunSettings) -> FrozenSettings:
    """How a run without a cache makes its features: as ``preload`` would, where it does not say."""
    said = {
        field.name: getattr(settings, field.name) for field in dataclasses.fields(FrozenSettings)
    }
    return FrozenSettings(**{name: value for name, value in said.items() if value is not None})


def require_settled(settings: RunSettings, plan: FeaturePlan) -> None:
    """Raise ``CacheMismatch`` where ``settings`` ask for other features than the cache's, those of
    ``plan``: whatever is said must be so, a value that would be the default elsewhere too."""
    have, asked = _recorded(plan), _asked(settings, plan)
    differing = [
        f"  {name}: the cache has {_shown(name, have[name])}, "
        f"this run asks for {_shown(name, value)}"
        for name, value in asked.items()
        if value is not None and value != have[name]
    ]
    if differing:
        raise CacheMismatch(
            "the feature cache was made with other settings:\n"
            + "\n".join(differing)
            + "\nleave the setting out, name the cache that fits, or preload into another "
            "--cache directory"
        )


def _recorded(plan: FeaturePlan) -> dict[str, Any]:
    """What the cache has, by the names of settings."""
    return {
        "backbone": plan.spec.name,
        "layers": plan.layers,
        "token_ratio": plan.token_ratio,
        "importance": plan.importance,
        "input_size": plan.preprocessing.size,
        "features": plan.features,
        "normalization": _name_of_channels(plan),
        "mean": plan.preprocessing.mean,
        "std": plan.preprocessing.std,
        "fit": plan.preprocessing.fit,
        "window": plan.reading.window,
        "dicom_frame": plan.reading.frame,
        "position_interpolation": plan.position_interpolation,
        "dtype": plan.dtype,
        "checkpoint_path": plan.checkpoint_path,
        "pretrained": plan.pretrained,
    }


def _asked(settings: RunSettings, plan: FeaturePlan) -> dict[str, Any]:
    """What a run asks for, None where it does not say."""
    size, checkpoint = settings.input_size, settings.checkpoint_path
    mean, std = _channels(settings, plan)
    return {
        "backbone": None if settings.backbone is None else _backbone_name(settings.backbone, plan),
        "layers": None if settings.layers is None else parse_layers(settings.layers),
        "token_ratio": settings.token_ratio,
        "importance": settings.importance,
        "input_size": None if size is None else parse_size("input_size", size),
        "features": settings.features,
        "normalization": _normalization(settings, plan),
        "mean": mean,
        "std": std,
        "fit": settings.fit,
        "window": settings.window,
        "dicom_frame": settings.dicom_frame,
        "position_interpolation": settings.position_interpolation,
        # auto leaves the choice to the machine that the cache was made on.
        "dtype": None if settings.dtype == "auto" else settings.dtype,
        "checkpoint_path": None if checkpoint is None else str(checkpoint.resolve()),
        # What is not said is true: only random weights can be asked for.
        "pretrained": None if settings.pretrained else False,
    }


def as_found(settings: _Run, plan: FeaturePlan | PeerPlan) -> _Run:
    """``settings`` with all that shapes the features as ``plan`` has it, asked for or not."""
    height, width = plan.preprocessing.size
    found: dict[str, Any] = {
        "input_size": str(height) if height == width else f"{height}x{width}",
        "mean": plan.preprocessing.mean,
        "std": plan.preprocessing.std,
        "fit": plan.preprocessing.fit,
        "window": plan.reading.window,
        "dicom_frame": plan.reading.frame,
    }
    if isinstance(plan, FeaturePlan):
        found |= {
            "backbone": plan.source,
            "token_ratio": plan.token_ratio,
            "importance": plan.importance,
            "features": plan.features,
            "position_interpolation": plan.position_interpolation,
            "dtype": plan.dtype,
        }
    return dataclasses.replace(settings, **found)


def _backbone_name(source: str, plan: FeaturePlan) -> str:
    """The name of the frozen model that was asked for, which need not be there any more."""
    if source == plan.source:
        return plan.spec.name
    try:
        return backbone_name(source)
    except BackboneError:
        return Path(source).name


def _channels(settings: RunSettings, plan: FeaturePlan) -> tuple[Any, Any]:
    """Mean and deviation that were asked for, given or by name (None: neither was)."""
    if settings.mean is not None or settings.std is not None:
        return settings.mean, settings.std
    if settings.normalization in (None, "auto", _name_of_channels(plan)):
        return None, None
    if settings.normalization == "backbone":
        return plan.spec.mean, plan.spec.std
    preset = dataset_preset(settings.normalization)
    return preset.mean, preset.std


def _normalization(settings: RunSettings, plan: FeaturePlan) -> str | None:
    """``auto``, where that was asked for and the cache's numbers were not measured."""
    asked = settings.normalization == "auto" and settings.mean is None and settings.std is None
    return "auto" if asked and _name_of_channels(plan) is not None else None


def _name_of_channels(plan: FeaturePlan) -> str | None:
    """What ``--normalization`` calls the numbers of ``plan``; None where they were measured, or
    given."""
    numbers = (plan.preprocessing.mean, plan.preprocessing.std)
    if numbers == (plan.spec.mean, plan.spec.std):
        return "backbone"
    presets = (dataset_preset(name) for name in preset_names())
    return next((p.name for p in presets if numbers == (p.mean, p.std)), None)


def _shown(name: str, value: Any) -> str:
    if name == "layers":
        return format_layers(value)
    if name == "input_size":
        return f"{value[0]}x{value[1]}"
    if name in ("mean", "std"):
        return " ".join(f"{channel:.4f}" for channel in value)
    return "none" if value is None else str(value)
