"""Frozen models by timm name: weights from the hub, from a checkpoint, or random on request."""

import difflib
import json
import logging
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fpt_fast.backbone.errors import BackboneError

_LOG = logging.getLogger("fpt_fast")
# Parts that the frozen pass does not read, so that a checkpoint may have or lack them.
_HEADS = ("head.", "head_dist.", "head_drop.", "attn_pool.", "fc.", "classifier.", "pre_logits.")


def create_timm_model(name: str, checkpoint_path: Path | None, pretrained: bool) -> nn.Module:
    """Create timm's model ``name`` with weights that were asked for, never with other ones.

    ``name`` may begin with ``timm/`` or ``hf-hub:``.  Raises ``BackboneError`` where the name is
    unknown, the hub cannot be reached, or the checkpoint does not fit.
    """
    if checkpoint_path is not None:
        return _with_checkpoint(_registry_name(name), checkpoint_path)
    if not pretrained:
        return _create(_registry_name(name))
    # timm pairs a name with its own repository on the hub; other repositories go by hf-hub:.
    source = name if name.startswith("hf-hub:") else _registry_name(name)
    try:
        return _create(source, pretrained=True)
    except BackboneError:
        raise
    except Exception as error:  # every kind of network, hub and checkpoint failure ends here
        raise BackboneError(
            f"cannot get the pretrained weights of {name!r} ({type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}). "
            "Without access to the hub, download the weights elsewhere and pass "
            "--checkpoint-path FILE.safetensors (in Python checkpoint_path=...); --no-pretrained "
            "gives random weights, for tests"
        ) from error


def load_timm_folder(folder: Path) -> nn.Module:
    """Create the model of a folder as timm saves it: ``config.json`` with ``architecture``."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise BackboneError(f"{folder} has a config.json of timm's but no model.safetensors")
    settings = dict(config.get("model_args") or {})
    cfg = config.get("pretrained_cfg") or {}
    overlay = {key: cfg[key] for key in ("mean", "std", "input_size") if key in cfg}
    model = _create(str(config["architecture"]), pretrained_cfg_overlay=overlay, **settings)
    _load(model, weights)
    return model


def _registry_name(name: str) -> str:
    short = name.removeprefix("hf-hub:").removeprefix("timm/")
    if "/" in short:
        raise BackboneError(
            f"{name!r} is neither a timm name nor a folder here; download that repository "
            "(huggingface-cli download … --local-dir FOLDER) and give the folder"
        )
    return short


def _create(name: str, **settings: Any) -> nn.Module:
    base = name.partition(".")[0]
    if ":" not in name and not timm.is_model(base):
        near = difflib.get_close_matches(base, timm.list_models(), n=3)
        hint = f"; near names are {', '.join(near)}" if near else ""
        raise BackboneError(
            f"timm {timm.__version__} has no model {base!r}{hint}. A folder must exist and hold "
            "config.json"
        )
    with torch.random.fork_rng(devices=[]):  # random initial weights are not the caller's affair
        torch.manual_seed(0)
        model: nn.Module = timm.create_model(name, **settings)
    return model


def _with_checkpoint(name: str, path: Path) -> nn.Module:
    if not path.is_file():
        raise BackboneError(f"checkpoint_path {path} is not a file")
    model = _create(name)
    size = _checkpoint_size(model, read_checkpoint(path))
    if size is not None:
        _LOG.info("%s: the checkpoint was trained at %dx%d", name, *size)
        model = _create(name, img_size=size)
    _load(model, path)
    return model


def _checkpoint_size(model: Any, state: dict[str, Tensor]) -> tuple[int, int] | None:
    """The image size of the checkpoint's positions where the model's differs, else None."""
    position, own = state.get("pos_embed"), getattr(model, "pos_embed", None)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if position is None or own is None or patch is None or position.shape == own.shape:
        return None
    grid = model.patch_embed.grid_size
    prefix = own.shape[1] - grid[0] * grid[1]
    side = round(max(0, position.shape[1] - prefix) ** 0.5)
    if side == 0 or side * side + prefix != position.shape[1]:
        return None
    return side * patch[0], side * patch[1]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read a state dict from ``.safetensors``, or from a torch file with weights only."""
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: dict[str, Tensor] = timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as error:
        raise BackboneError(
            f"cannot read the checkpoint {path}: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}; safetensors files and torch files that hold "
            "weights only can be read"
        ) from error
    return state


def _load(model: Any, path: Path) -> None:
    state = read_checkpoint(path)
    problems = _mismatches(model, state)
    if problems:
        # Checkpoints in their authors' layout: timm knows how to rename their keys.
        from timm.models.vision_transformer import checkpoint_filter_fn

        try:
            state = checkpoint_filter_fn(state, model, adapt_layer_scale=True)
        except Exception as error:
            raise _does_not_fit(model, path, problems) from error
        if _mismatches(model, state):
            raise _does_not_fit(model, path, problems)
    own = model.state_dict()
    model.load_state_dict(
        {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}, strict=False
    )


def _mismatches(model: nn.Module, state: dict[str, Any]) -> list[str]:
    """What keeps ``state`` from being the weights of ``model``, heads aside."""
    own = {k: v for k, v in model.state_dict().items() if not k.startswith(_HEADS)}
    given = {k: v for k, v in state.items() if not k.startswith(_HEADS) and k != "mask_token"}
    problems = [f"{k} is missing" for k in own if k not in given]
    problems += [f"{k} is not the model's" for k in given if k not in own]
    problems += [
        f"{k} is {tuple(v.shape)}, not {tuple(own[k].shape)}"
        for k, v in given.items()
        if k in own and v.shape != own[k].shape
    ]
    return problems


def _does_not_fit(model: nn.Module, path: Path, problems: list[str]) -> BackboneError:
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    return BackboneError(
        f"the checkpoint {path} does not fit the {type(model).__name__}: "
        f"{'; '.join(problems[:4])}{more}. Name the model that the checkpoint was saved from"
    )
