"""A peer as the trainer sees it, and how it is saved: the trained tensors only."""

import dataclasses
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.model_files import (
    ModelFileError,
    load_tensors,
    positive_int,
    read_model,
    spec_from_json,
    trainable_message,
    write_model,
)
from fpt_fast.peers.config import PeerConfig
from fpt_fast.peers.encoder import Encoder
from fpt_fast.peers.registry import PEERS
from fpt_fast.peers.source import BackboneSource
from fpt_fast.records import BackboneSpec, FeatureBatch

PEER_FORMAT = "fpt-fast peer 1"


class PeerModel(nn.Module):
    """One of the compared methods on a copy of ``backbone``, with a linear head.

    Called as ``model(batch) -> logits``; ``batch.side_pixels`` hold the images at full resolution,
    and ``batch.kv`` is not looked at.  Exactly the method's own parameters and the head require
    gradients, and ``state_dict`` has these alone: the frozen model is found again by ``source``.
    ``spec`` describes it; ``extra`` travels with ``save_pretrained`` and means nothing here.
    Raises ``ConfigError`` where the method cannot work on that model.
    """

    def __init__(
        self,
        config: PeerConfig,
        backbone: FrozenBackbone,
        num_outputs: int,
        *,
        source: BackboneSource | None = None,
    ) -> None:
        super().__init__()
        config.check_against(backbone.spec)
        self.config = config
        self.spec: BackboneSpec = backbone.spec
        self.num_outputs = num_outputs
        self.source = source or BackboneSource()
        self.extra: dict[str, Any] = {}
        encoder = Encoder(backbone, config)
        self.network = PEERS[config.method](encoder, config)
        self.head = nn.Linear(encoder.width, num_outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        self._trained = frozenset(n for n, p in self.named_parameters() if p.requires_grad)
        self.register_state_dict_post_hook(_keep_trained)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_allow_frozen)  # type: ignore[no-untyped-call]

    def forward(self, batch: FeatureBatch) -> Tensor:
        """Return logits ``[B, num_outputs]`` of the images of a batch."""
        pixels = batch.side_pixels
        # Without it, whoever calls decides: the trainer has a precision of its own.
        mixed = self.config.mixed_precision
        with torch.autocast(pixels.device.type, torch.bfloat16) if mixed else nullcontext():
            logits: Tensor = self.head(self.network(pixels))
        return logits.float()

    def trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters are trained, and how many there are."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    def print_trainable_parameters(self) -> None:
        """Write trainable, all and their percentage to standard output, as peft words it."""
        sys.stdout.write(trainable_message(*self.trainable_parameters()) + "\n")

    def save_pretrained(
        self, directory: str | Path, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors`` (the trained tensors) as ``FptModel``
        does; ``extra`` (JSON values, by name) replaces the model's own, None keeps it."""
        extra = self.extra if extra is None else dict(extra)
        description = {
            "format": PEER_FORMAT,
            "config": self.config.to_json(),
            "spec": dataclasses.asdict(self.spec),
            "source": self.source.to_json(Path(directory)),
            "num_outputs": self.num_outputs,
            "extra": extra,
        }
        write_model(directory, description, self.state_dict())
        self.extra = extra

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        backbone: FrozenBackbone | str | Path | None = None,
        checkpoint_path: str | Path | None = None,
    ) -> Self:
        """Read a model that ``save_pretrained`` wrote; on the CPU, in evaluation mode.

        The frozen model is loaded from where it was, seen from ``directory``, or from ``backbone``
        (with ``checkpoint_path``); its weights must be those of training, except for full
        fine-tuning, which saves all of them.  Raises ``FileNotFoundError`` and ``ModelFileError``
        as ``FptModel`` does, the latter also for a frozen model that is missing or has other
        weights.
        """
        description, tensors = read_model(directory, PEER_FORMAT)
        try:
            config = PeerConfig.from_json(description["config"])
            spec = spec_from_json(description["spec"])
            source = BackboneSource(**description["source"])
            num_outputs = positive_int("num_outputs", description["num_outputs"])
            extra = dict(description["extra"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{directory} does not describe a model: {error}") from error
        found = _find_backbone(Path(directory), config, source, backbone, checkpoint_path)
        _require_same(found.spec, spec, config)
        model = cls(config, found, num_outputs, source=source)
        # The weights that training began with, which full fine-tuning has left behind.
        model.spec = spec
        model.extra = extra
        load_tensors(model, tensors, directory)
        return model.eval()


def _keep_trained(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Leave of a state dict what is trained; the rest has not changed since it was loaded."""
    assert isinstance(module, PeerModel)
    for name in [n for n in state if n.removeprefix(prefix) not in module._trained]:
        del state[name]


def _allow_frozen(module: nn.Module, keys: Any) -> None:
    """A state dict without the frozen tensors lacks nothing."""
    assert isinstance(module, PeerModel)
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in module._trained]


def _find_backbone(
    directory: Path,
    config: PeerConfig,
    source: BackboneSource,
    backbone: FrozenBackbone | str | Path | None,
    checkpoint_path: str | Path | None,
) -> FrozenBackbone:
    if isinstance(backbone, FrozenBackbone):
        return backbone
    if backbone is None:
        if source.source is None:
            raise ModelFileError(
                f"{directory} was trained on a frozen model that was given as an object, and only "
                "the trained weights are saved; pass backbone="
            )
        if checkpoint_path is not None or config.method == "full":
            source = replace(source, checkpoint_path=None)  # not needed
        source = source.find(directory)
        backbone, checkpoint_path = source.source, checkpoint_path or source.checkpoint_path
        assert backbone is not None
    needs_weights = config.method != "full"
    return load_backbone(
        backbone,
        checkpoint_path=checkpoint_path if needs_weights else None,
        pretrained=source.pretrained and needs_weights,
        dtype="float32",
        device="cpu",
        position_interpolation=config.position_interpolation,
    )


def _require_same(found: BackboneSpec, spec: BackboneSpec, config: PeerConfig) -> None:
    if config.method != "full" and found.weights_hash != spec.weights_hash:
        raise ModelFileError(
            f"the frozen model has other weights than the model was trained on: expected "
            f"{spec.name} with hash {spec.weights_hash}, got {found.name} with "
            f"{found.weights_hash}; name the right one with backbone or checkpoint_path"
        )
