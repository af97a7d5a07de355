"""Configuration of a peer: what each method is given, and what the papers gave it."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from fpt_fast.config import PEER_METHODS, ConfigError, PeerMethod, from_mapping, require
from fpt_fast.records import BackboneSpec

# Peak learning rates where none is given.  The papers publish none for the peers (they searched
# them per data set): these are ours, of the usual size for each method under AdamW.
LEARNING_RATES: dict[PeerMethod, float] = {
    "full": 5e-5,
    "linear": 1e-3,
    "prompt": 5e-3,
    "attention": 1e-4,
    "adapter": 1e-3,
    "bitfit": 1e-3,
    "lora": 1e-3,
    "side": 1e-3,
}

# Which method reads which field; what a method does not read must be left at its default.
OWN_FIELDS: dict[str, PeerMethod] = {
    "num_prompts": "prompt",
    "prompt_depth": "prompt",
    "bottleneck": "adapter",
    "adapter_places": "adapter",
    "rank": "lora",
    "lora_targets": "lora",
    "side_reduction": "side",
    "side_init": "side",
}


@dataclass(frozen=True, slots=True)
class PeerConfig:
    """One of the methods that the papers compare with; the defaults are those of docs/methods.md.

    ``num_prompts`` per layer and ``prompt_depth`` are visual prompt tuning's, ``bottleneck`` (width
    of an adapter) and ``adapter_places`` (behind attention and MLP, or the MLP) the adapter's,
    ``rank`` and ``lora_targets`` (the projection to query, key and value, or that of the output as
    well) LoRA's, ``side_reduction`` (frozen width over side width) and ``side_init`` ladder
    side-tuning's.  ``gradient_checkpointing`` keeps only the blocks'
    inputs for the backward pass, ``mixed_precision`` multiplies in bf16 with weights in f32.
    ``attention`` ``"plain"`` keeps the N x N map of every layer for the backward pass, as the
    implementations behind the published memory figures did; ``"fused"`` does not.
    """

    method: PeerMethod
    num_prompts: int = 16
    prompt_depth: Literal["deep", "shallow"] = "deep"
    bottleneck: int = 48
    adapter_places: Literal["both", "mlp"] = "both"
    rank: int = 16
    lora_targets: Literal["qkv", "attention"] = "qkv"
    side_reduction: int = 8
    side_init: Literal["pruned", "random"] = "pruned"
    gradient_checkpointing: bool = False
    mixed_precision: bool = False
    attention: Literal["fused", "plain"] = "fused"
    position_interpolation: Literal["timm", "bicubic_scale"] = "timm"

    def __post_init__(self) -> None:
        require(
            self.method in PEER_METHODS, "method", f"one of {', '.join(PEER_METHODS)}", self.method
        )
        for name in ("num_prompts", "bottleneck", "rank", "side_reduction"):
            require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name, allowed in (
            ("prompt_depth", ("deep", "shallow")),
            ("adapter_places", ("both", "mlp")),
            ("lora_targets", ("qkv", "attention")),
            ("side_init", ("pruned", "random")),
            ("attention", ("fused", "plain")),
            ("position_interpolation", ("timm", "bicubic_scale")),
        ):
            value = getattr(self, name)
            require(value in allowed, name, " or ".join(map(repr, allowed)), value)
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, owner in OWN_FIELDS.items():
            if self.method != owner and getattr(self, name) != defaults[name]:
                raise ConfigError(
                    f"{name} belongs to method={owner!r}, got {getattr(self, name)!r} with "
                    f"method={self.method!r}; leave it out"
                )
        if self.method == "linear" and self.gradient_checkpointing:
            raise ConfigError(
                "gradient_checkpointing saves nothing with method='linear', which keeps nothing of "
                "the frozen model for the backward pass; leave it out"
            )

    def check_against(self, spec: BackboneSpec) -> None:
        """Raise ``ConfigError`` where this method cannot work on that model."""
        if self.method != "side":
            return
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

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; ``from_json`` gives an equal configuration back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of ``to_json``; an unknown key is an error."""
        return from_mapping(cls, values)
