"""The trainable model, fusion and side network together, and how it is saved."""

import dataclasses
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import torch
from torch import Tensor, nn

from fpt_fast.config import PEER_METHODS, FptConfig, Method, PeerMethod, preset
from fpt_fast.fusion import PromptFusion
from fpt_fast.hub import fetch_model_folder, is_repository
from fpt_fast.model_files import (
    CONFIG_FILE,
    ModelFileError,
    load_tensors,
    positive_int,
    read_model,
    spec_from_json,
    trainable_message,
    write_model,
)
from fpt_fast.profiling import span
from fpt_fast.records import BackboneSpec, FeatureBatch
from fpt_fast.side_network import SideNetwork

if TYPE_CHECKING:
    from fpt_fast.backbone import FrozenBackbone
    from fpt_fast.peers import PeerConfig, PeerModel

_FORMAT = "fpt-fast model 1"


class FptModel(nn.Module):
    """Everything that is trained: ``fusion`` (None for a side network alone) and ``side``.

    ``config`` is the method, ``spec`` describes the frozen model that makes the features,
    ``num_outputs`` is the number of classes, or 1 for a regression model.  ``extra`` (class
    names, say) travels with ``save_pretrained`` and means nothing to the model.
    ``frozen_parameters`` is the frozen model's parameter count where it is known.  Raises
    ``ConfigError`` where the method cannot work on that frozen model.
    """

    def __init__(
        self,
        config: FptConfig,
        spec: BackboneSpec,
        num_outputs: int,
        *,
        frozen_parameters: int | None = None,
    ) -> None:
        super().__init__()
        config.check_against(spec)
        self.config = config
        self.spec = spec
        self.num_outputs = num_outputs
        self.frozen_parameters = frozen_parameters
        self.extra: dict[str, Any] = {}

        self.layers = config.resolve_layers(spec.depth)
        side_width = spec.hidden_size // config.side_reduction
        self.fusion = (
            PromptFusion(
                num_layers=len(self.layers),
                frozen_width=spec.hidden_size,
                side_width=side_width,
                num_heads=spec.num_heads,
                num_prompts=config.num_prompts,
                prompt_dim=spec.hidden_size if config.prompt_dim == "frozen" else side_width,
                prompt_norm=config.prompt_norm,
                prompt_proj=config.prompt_proj,
                dropout=config.fusion_dropout,
            )
            if config.fusion
            else None
        )
        self.side = SideNetwork(
            width=side_width,
            num_heads=spec.num_heads,
            num_layers=len(self.layers),
            patch_size=spec.patch_size,
            image_size=config.side_size,
            num_outputs=num_outputs,
            layer_norm_eps=config.layer_norm_eps,
        )

    def forward(self, batch: FeatureBatch) -> Tensor:
        """Return logits ``[B, num_outputs]`` of a batch.

        Raises ``ValueError`` where the batch has no features but the method fuses them, or where
        a shape does not fit the model.  A side network alone does not look at ``batch.kv``.
        """
        states = None
        if self.fusion is not None:
            if batch.kv is None:
                raise ValueError(
                    "batch.kv must hold the frozen model's features for this model, got None; "
                    "use a cache or a loader that runs the frozen model, or fusion=False"
                )
            with _span("fusion"):
                states = self.fusion(batch.kv, batch.rows, feature_scales(batch))
        with _span("side forward"):
            logits: Tensor = self.side(batch.side_pixels, states)
        return logits

    def trainable_parameters(self) -> tuple[int, int]:
        """Return how many parameters are trained, and how many there are with the frozen model's.

        Where the frozen model was not at hand (``frozen_parameters`` is None) its parameters are
        reckoned from the widths in ``spec``: exact for a plain ViT without its head (biases
        everywhere, MLP four times as wide), about right for other kinds.
        """
        own = sum(p.numel() for p in self.parameters())
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        frozen = self.frozen_parameters
        return trainable, own + (_plain_vit_parameters(self.spec) if frozen is None else frozen)

    def print_trainable_parameters(self) -> None:
        """Write trainable, all and their percentage to standard output, as peft words it."""
        trainable, total = self.trainable_parameters()
        reckoned = " (frozen model reckoned from its widths)"
        sys.stdout.write(
            f"{trainable_message(trainable, total)}"
            f"{reckoned if self.frozen_parameters is None else ''}\n"
        )

    def save_pretrained(
        self, directory: str | Path, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``directory``, made if missing.

        ``extra`` (JSON values, by name) replaces the model's own; None keeps it.  Each file is
        replaced atomically, and the weights carry a copy of the configuration, so that a save
        killed between the two still loads.  Raises ``ValueError`` for values that JSON does not
        know, ``OSError`` where the directory cannot be written.
        """
        extra = self.extra if extra is None else dict(extra)
        description = {
            "format": _FORMAT,
            "config": self.config.to_json(),
            "spec": dataclasses.asdict(self.spec),
            "num_outputs": self.num_outputs,
            "frozen_parameters": self.frozen_parameters,
            "extra": extra,
        }
        write_model(directory, description, self.state_dict())
        self.extra = extra

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, revision: str | None = None) -> Self:
        """Read a model that ``save_pretrained`` wrote; on the CPU, in evaluation mode.

        ``directory`` is a folder, or ``"owner/name"`` of a repository of the Hugging Face hub, of
        which ``revision`` names a branch, a tag or a commit.  Raises ``FileNotFoundError`` where a
        file is missing, ``ModelFileError`` where one is damaged, or where the weights are not this
        model's (naming what is missing or too much), ``HubError`` where the hub does not answer.
        """
        folder = Path(directory)
        if is_repository(str(directory)):
            folder = fetch_model_folder(str(directory), revision=revision)
        description, tensors = read_model(folder, _FORMAT)
        try:
            model = cls._build_empty(description, len(tensors))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(
                f"{folder / CONFIG_FILE} does not describe a model: {error}"
            ) from error
        load_tensors(model, tensors, folder)
        return model.eval()

    @classmethod
    def _build_empty(cls, description: Mapping[str, Any], num_tensors: int) -> Self:
        """Build the described model without storage, so that a hostile file costs no memory."""
        config = FptConfig.from_json(description["config"])
        spec = spec_from_json(description["spec"])
        num_outputs = positive_int("num_outputs", description["num_outputs"])
        layers = config.resolve_layers(spec.depth)
        if len(layers) > num_tensors:
            raise ValueError(f"{len(layers)} layers, but the weights hold {num_tensors} tensors")
        frozen = description["frozen_parameters"]
        with torch.device("meta"):
            model = cls(config, spec, num_outputs, frozen_parameters=frozen)
        model.extra = dict(description["extra"])
        return model


def _span(name: str) -> AbstractContextManager[Any]:
    """A range in Nsight's timeline; a compiled model has none, for it would be broken by them."""
    return nullcontext() if torch.compiler.is_compiling() else span(name)


@overload
def create_model(
    method: "Method | FptConfig",
    *,
    backbone: "str | Path | FrozenBackbone | BackboneSpec",
    num_classes: int,
    seed: int = 0,
    **changes: Any,
) -> FptModel: ...


@overload
def create_model(
    method: "PeerMethod | PeerConfig",
    *,
    backbone: "str | Path | FrozenBackbone",
    num_classes: int,
    seed: int = 0,
    **changes: Any,
) -> "PeerModel": ...


@overload
def create_model(
    method: str,
    *,
    backbone: "str | Path | FrozenBackbone | BackboneSpec",
    num_classes: int,
    seed: int = 0,
    **changes: Any,
) -> "FptModel | PeerModel": ...


def create_model(
    method: "str | FptConfig | PeerConfig",
    *,
    backbone: "str | Path | FrozenBackbone | BackboneSpec",
    num_classes: int,
    seed: int = 0,
    **changes: Any,
) -> "FptModel | PeerModel":
    """Create a model to train, with fresh weights.

    ``create_model("fpt_plus", backbone="vit_base_patch16_384", num_classes=5)``.
    ``method`` is ``"fpt_plus"``, ``"fpt"``, one of the methods that they are compared with
    (``"full"``, ``"linear"``, ``"prompt"``, ``"attention"``, ``"adapter"``, ``"bitfit"``,
    ``"lora"``, ``"side"``; docs/methods.md) or a configuration; ``changes`` alter its fields by
    name (``layers=(2, 5)``).  A ``backbone`` given by name or path is loaded to learn its
    widths and the hash of its weights, then let go: pass the ``FrozenBackbone`` or its ``spec``
    where you have one.  The compared methods keep a copy of it, so a ``spec`` does not do for
    them.  ``num_classes`` is 1 for a regression model.  ``seed`` fixes the initial
    weights and leaves PyTorch's generator untouched.  Raises ``ConfigError`` where the method
    cannot work on that frozen model.
    """
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if isinstance(method, FptConfig):
        config = FptConfig.from_json({**method.to_json(), **changes})
    elif isinstance(method, str) and method not in PEER_METHODS:
        config = preset(method, **changes)
    else:
        # Imported here: the peers bring the backbone's code with them.
        from fpt_fast.peers import create_peer

        return create_peer(method, backbone, num_classes, seed, changes)
    spec, frozen_parameters = _describe(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FptModel(config, spec, num_classes, frozen_parameters=frozen_parameters)


def feature_scales(batch: FeatureBatch) -> tuple[Tensor, Tensor] | None:
    """Scales of a batch's 8-bit features as ``prompt_attention`` takes them, None without."""
    if batch.k_scales is not None and batch.v_scales is not None:
        return batch.k_scales, batch.v_scales
    if batch.k_scales is not None or batch.v_scales is not None:
        raise ValueError("batch.k_scales and batch.v_scales belong together, got only one of them")
    return None


def _describe(
    backbone: "str | Path | FrozenBackbone | BackboneSpec",
) -> tuple[BackboneSpec, int | None]:
    if isinstance(backbone, BackboneSpec):
        return backbone, None
    if isinstance(backbone, str | Path):
        # Imported here: a model made from a cache's description needs no backbone code at all.
        from fpt_fast.backbone import load_backbone

        backbone = load_backbone(backbone, device="cpu")
    return backbone.spec, sum(p.numel() for p in backbone.vit.parameters())


def _plain_vit_parameters(spec: BackboneSpec) -> int:
    width, (height, columns) = spec.hidden_size, spec.patch_size
    patches = (spec.image_size[0] // height) * (spec.image_size[1] // columns)
    embedding = (3 * height * columns + 1) * width + (patches + 2 * spec.prefix_tokens) * width
    layer = 12 * width * width + 13 * width
    return embedding + spec.depth * layer + 2 * width
