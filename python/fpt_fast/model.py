"""The trainable model, fusion and side network together, and how it is saved."""

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise_tensors
from torch import Tensor, nn

from fpt_fast.config import FptConfig, preset
from fpt_fast.files import sync_directory
from fpt_fast.fusion import PromptFusion
from fpt_fast.hub import fetch_model_folder, is_repository
from fpt_fast.profiling import span
from fpt_fast.records import BackboneSpec, FeatureBatch
from fpt_fast.side_network import SideNetwork

if TYPE_CHECKING:
    from fpt_fast.backbone import FrozenBackbone

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_FORMAT = "fpt-fast model 1"
_LARGEST_CONFIG = 1 << 24
_LARGEST_NUMBER = 1 << 20

_log = logging.getLogger("fpt_fast")


class ModelFileError(ValueError):
    """A saved model that cannot be used; says which file, what is wrong, what to do."""


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
            f"trainable params: {trainable:,d} || all params: {total:,d} || "
            f"trainable%: {100 * trainable / total:.4f}"
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
        try:
            text = json.dumps(description, indent=2, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"extra must hold JSON values only: {error}") from error
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / WEIGHTS_FILE, serialise_tensors(tensors, metadata={"fpt_fast": text}))
        replace_file(folder / CONFIG_FILE, text.encode())
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
        description = _read_description(folder / CONFIG_FILE)
        metadata, tensors = _read_weights(folder / WEIGHTS_FILE)
        if "fpt_fast" in metadata:
            own = _parse_description(metadata["fpt_fast"], folder / WEIGHTS_FILE)
            if own != description:
                _log.warning(
                    "%s is not the configuration that the weights beside it were saved with "
                    "(edited, or a save was interrupted); the weights' own copy is used",
                    folder / CONFIG_FILE,
                )
            description = own
        try:
            model = cls._build_empty(description, len(tensors))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelFileError(
                f"{folder / CONFIG_FILE} does not describe a model: {error}"
            ) from error
        _check_tensors(model.state_dict(), tensors, folder / WEIGHTS_FILE)
        model.load_state_dict(tensors, assign=True)
        return model.eval()

    @classmethod
    def _build_empty(cls, description: Mapping[str, Any], num_tensors: int) -> Self:
        """Build the described model without storage, so that a hostile file costs no memory."""
        config = FptConfig.from_json(description["config"])
        spec = _spec_from_json(description["spec"])
        num_outputs = _positive_int("num_outputs", description["num_outputs"])
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


def create_model(
    method: str | FptConfig,
    *,
    backbone: "str | Path | FrozenBackbone | BackboneSpec",
    num_classes: int,
    seed: int = 0,
    **changes: Any,
) -> FptModel:
    """Create a model to train, with fresh weights.

    ``create_model("fpt_plus", backbone="vit_base_patch16_384", num_classes=5)``.
    ``method`` is ``"fpt_plus"``, ``"fpt"`` or a configuration; ``changes`` alter its fields by
    name (``layers=(2, 5)``).  A ``backbone`` given by name or path is loaded to learn its
    widths and the hash of its weights, then let go: pass the ``FrozenBackbone`` or its ``spec``
    where you have one.  ``num_classes`` is 1 for a regression model.  ``seed`` fixes the initial
    weights and leaves PyTorch's generator untouched.  Raises ``ConfigError`` where the method
    cannot work on that frozen model.
    """
    if isinstance(method, FptConfig):
        config = FptConfig.from_json({**method.to_json(), **changes})
    else:
        config = preset(method, **changes)
    spec, frozen_parameters = _describe(backbone)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
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


def replace_file(path: Path, content: bytes) -> None:
    """Write ``content`` so that a reader of ``path`` sees the old file or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a folder written by save_pretrained")
    if path.stat().st_size > _LARGEST_CONFIG:
        raise ModelFileError(f"{path} has {path.stat().st_size} bytes: not a model's configuration")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ModelFileError(f"{path} is not UTF-8 text: {error}") from error
    return _parse_description(text, path)


def _parse_description(text: str, path: Path) -> dict[str, Any]:
    try:
        description = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} does not hold JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != _FORMAT:
        found = description.get("format") if isinstance(description, dict) else None
        raise ModelFileError(f"{path} must have the format {_FORMAT!r}, got {found!r}")
    return description


def _read_weights(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: not a folder written by save_pretrained")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return file.metadata() or {}, tensors
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} is not a sound safetensors file: {error}") from error


def _check_tensors(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name in expected.keys() & found.keys():
        if expected[name].shape != found[name].shape:
            problems.append(
                f"{name} must be {tuple(expected[name].shape)}, got {tuple(found[name].shape)}"
            )
        elif not found[name].is_floating_point():
            problems.append(f"{name} must be of a floating-point dtype, got {found[name].dtype}")
    if problems:
        raise ModelFileError(f"{path} does not hold this model's weights: " + "; ".join(problems))


def _spec_from_json(values: Mapping[str, Any]) -> BackboneSpec:
    known = [field.name for field in dataclasses.fields(BackboneSpec)]
    if set(values) != set(known):
        raise ValueError(
            f"spec must have exactly the keys {', '.join(known)}, got {sorted(values)}"
        )
    fields = dict(values)
    for name in ("hidden_size", "num_heads", "depth"):
        _positive_int(name, fields[name])
    for name in ("patch_size", "image_size"):
        fields[name] = tuple(_positive_int(name, number) for number in fields[name])
    for name in ("mean", "std"):
        fields[name] = tuple(float(number) for number in fields[name])
    return BackboneSpec(**fields)


def _positive_int(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_NUMBER:
        raise ValueError(f"{name} must be a whole number in 1..{_LARGEST_NUMBER}, got {value!r}")
    return value
