"""What shapes the features: the frozen model, its input and the selection, as one value.

``FeaturePlan`` is made from the settings of a command, travels into a cache as its fingerprint,
and comes back out of it, so that training and prediction never guess.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpt_fast.backbone import BackboneError, FrozenBackbone, load_backbone
from fpt_fast.cache import CacheMismatch, RecordLayout
from fpt_fast.config import ConfigError, parse_layers
from fpt_fast.loader import FrozenPass
from fpt_fast.ops import quantise_kv
from fpt_fast.records import (
    AS_THE_FILE_SAYS,
    Attention,
    BackboneSpec,
    FeatureDtype,
    Importance,
    Preprocessing,
    Reading,
)
from fpt_fast.selection import keep_count

# Raised whenever the same settings begin to give other features.
FEATURES_VERSION = 1

# What a fingerprint that does not say is of: those of older caches stay as they have always been.
_FIRST_FEATURES: FeatureDtype = "float16"
_UNSAID: dict[str, Any] = {
    "features": _FIRST_FEATURES,
    "fit": "stretch",
    "window": AS_THE_FILE_SAYS.window,
    "dicom_frame": AS_THE_FILE_SAYS.frame,
}


@dataclass(frozen=True, slots=True)
class FeaturePlan:
    """All that shapes the features.

    ``source``, ``checkpoint_path`` and ``pretrained`` say where the frozen model was found: they
    help to find it again, and are no part of the identity, which the weights' hash carries.
    ``dtype`` is the arithmetic of the frozen pass, ``features`` what keys and values are kept in.
    ``attention`` says which implementation made them, where that is known.
    """

    spec: BackboneSpec
    source: str
    checkpoint_path: str | None
    pretrained: bool
    position_interpolation: str
    dtype: str
    preprocessing: Preprocessing
    layers: tuple[int, ...]
    token_ratio: float
    importance: Importance
    features: FeatureDtype = "float16"
    attention: str | None = None
    reading: Reading = AS_THE_FILE_SAYS

    @property
    def layout(self) -> RecordLayout:
        """Shape of one image's record."""
        return RecordLayout(
            layers=len(self.layers),
            heads=self.spec.num_heads,
            kept=keep_count(self.token_ratio, self.spec.num_tokens(self.preprocessing.size)),
            head_width=self.spec.head_width,
            dtype=self.features,
        )

    @property
    def quantise(self) -> partial[tuple[Tensor, Tensor, Tensor]] | None:
        """What a cache's writer turns f16 features into 8-bit ones with, where they are."""
        return quantiser(self.features)

    def fingerprint(self) -> dict[str, Any]:
        """Identity of the features, as JSON values."""
        spec = dataclasses.asdict(self.spec)
        values: dict[str, Any] = {f"backbone.{name}": value for name, value in spec.items()}
        values |= {
            "features_version": FEATURES_VERSION,
            "position_interpolation": self.position_interpolation,
            "dtype": self.dtype,
            "input_size": self.preprocessing.size,
            "mean": self.preprocessing.mean,
            "std": self.preprocessing.std,
            "layers": self.layers,
            "token_ratio": self.token_ratio,
            "importance": self.importance,
        }
        said = {
            "features": self.features,
            "fit": self.preprocessing.fit,
            "window": self.reading.window,
            "dicom_frame": self.reading.frame,
        }
        values |= {name: value for name, value in said.items() if value != _UNSAID[name]}
        return {name: _plain(value) for name, value in values.items()}

    def sources(self) -> dict[str, Any]:
        """Where the frozen model was found and how it ran: notes, no part of the identity."""
        return {
            # Implementations of one attention differ by rounding, as devices do: no part either.
            "attention": self.attention,
            "source": self.source,
            "checkpoint_path": self.checkpoint_path,
            "pretrained": self.pretrained,
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, its sources included; ``from_json`` reads it back."""
        return self.fingerprint() | self.sources()

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "FeaturePlan":
        """Inverse of ``to_json``, and of ``fingerprint`` (without sources)."""
        try:
            spec = {
                field.name: _tupled(values[f"backbone.{field.name}"])
                for field in dataclasses.fields(BackboneSpec)
            }
            return cls(
                spec=BackboneSpec(**spec),
                source=str(values.get("source", spec["name"])),
                checkpoint_path=values.get("checkpoint_path"),
                pretrained=bool(values.get("pretrained", True)),
                position_interpolation=values["position_interpolation"],
                dtype=values["dtype"],
                preprocessing=Preprocessing(
                    size=_tupled(values["input_size"]),
                    mean=_tupled(values["mean"]),
                    std=_tupled(values["std"]),
                    fit=values.get("fit", _UNSAID["fit"]),
                ),
                layers=_tupled(values["layers"]),
                token_ratio=values["token_ratio"],
                importance=values["importance"],
                features=values.get("features", _FIRST_FEATURES),
                attention=values.get("attention"),
                reading=Reading(
                    values.get("window", _UNSAID["window"]),
                    values.get("dicom_frame", _UNSAID["dicom_frame"]),
                ),
            )
        except KeyError as error:
            raise ConfigError(
                f"the recorded feature settings lack {error.args[0]!r}; they were not written by "
                "this version of fpt-fast: preload again"
            ) from error

    def frozen_pass(self, backbone: FrozenBackbone) -> FrozenPass:
        """The frozen pass of this plan on ``backbone``, whose weights must be the recorded ones."""
        if backbone.spec.weights_hash != self.spec.weights_hash:
            raise CacheMismatch(
                f"the frozen model has other weights than those of the features: expected "
                f"{self.spec.name} with hash {self.spec.weights_hash}, got {backbone.spec.name} "
                f"with {backbone.spec.weights_hash}; name the right one with --backbone or "
                "--checkpoint-path"
            )
        return FrozenPass(
            backbone,
            self.preprocessing,
            self.layers,
            self.token_ratio,
            self.importance,
            self.features,
        )

    def differences(self, other: "FeaturePlan") -> list[tuple[str, Any, Any]]:
        """What of the identity differs: name, value of this plan, value of ``other``."""
        ours, theirs = _UNSAID | self.fingerprint(), _UNSAID | other.fingerprint()
        return [(name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]]

    def require_equal(self, other: "FeaturePlan", what: str) -> None:
        """Raise ``CacheMismatch`` where ``other``, the features of ``what``, are not these."""
        differing = [
            f"  {name}: the run has {mine}, {what} has {its}"
            for name, mine, its in self.differences(other)
        ]
        if differing:
            raise CacheMismatch(
                f"{what} was made with other settings than the features of this run:\n"
                + "\n".join(differing)
                + "\nname the cache that the run was trained with, or one preloaded with the "
                "run's settings"
            )


def load_recorded_backbone(
    plan: FeaturePlan,
    *,
    backbone: str | None,
    checkpoint_path: Path | None,
    dtype: str,
    device: str,
    attention: Attention,
) -> FrozenBackbone:
    """Load the frozen model of a run again, from where it was or from where it is said to be.

    ``dtype="auto"`` is the arithmetic that the run's features were made in.
    """
    recorded = None
    if backbone is None:
        recorded = None if plan.checkpoint_path is None else Path(plan.checkpoint_path)
        _require_there(plan.source, checkpoint_path or recorded)
    try:
        return load_backbone(
            backbone or plan.source,
            checkpoint_path=checkpoint_path or recorded,
            pretrained=plan.pretrained,
            dtype=plan.dtype if dtype == "auto" else dtype,
            device=device,
            position_interpolation=plan.position_interpolation,  # type: ignore[arg-type]
            attention=attention,
        )
    except BackboneError as error:
        if backbone is not None:
            raise
        raise BackboneError(
            f"the frozen model of the run, {plan.source}, is not found: {error}; say where it is "
            "with --backbone: its weights are checked"
        ) from error


def _require_there(source: str, weights: Path | None) -> None:
    """Raise ``ConfigError`` where the frozen model is no longer where a run says."""
    if Path(source).is_absolute() and not Path(source).is_dir():
        raise ConfigError(
            f"the frozen model was in {source}, which is not there; say where it is with "
            "--backbone: its weights are checked"
        )
    if weights is not None and not weights.is_file():
        raise ConfigError(
            f"the weights of the frozen model {source} were in {weights}, which is not there; say "
            "where they are with --backbone and --checkpoint-path: they are checked"
        )


def quantiser(features: FeatureDtype) -> partial[tuple[Tensor, Tensor, Tensor]] | None:
    """``quantise_kv`` to the dtype of ``features``; None where that is f16."""
    if features == "float16":
        return None
    return partial(quantise_kv, dtype=getattr(torch, features))


def parse_optional_layers(text: str | None) -> tuple[int, ...] | None:
    """Layers as written on the command line, or None."""
    return None if text is None else parse_layers(text)


def recorded_source(source: str) -> str:
    """A directory by its absolute path, so that a run finds it from anywhere; a name as it is."""
    path = Path(source)
    return str(path.resolve()) if path.is_dir() else source


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
