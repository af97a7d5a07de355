"""``modules.builder`` of the authors' code: models from their Hydra configuration object."""

import logging
from types import SimpleNamespace
from typing import Any

from torch import nn

from fpt_fast.compat.bridge import FineGrainedPromptTuning, FusionModule
from fpt_fast.compat.checkpoints import read_state_dict
from fpt_fast.compat.frozen_vit import ViTForImageClassification as FrozenViT
from fpt_fast.compat.frozen_vit import read_config_file
from fpt_fast.compat.side_vit import ViTForImageClassification as SideViT
from fpt_fast.config import REGRESSION_LOSSES

_log = logging.getLogger("fpt_fast")


def generate_model(cfg: Any) -> tuple[FrozenViT | None, FineGrainedPromptTuning]:
    """Return ``(frozen_encoder, model)`` on ``cfg.base.device``.

    ``cfg`` is the authors' configuration, by attributes (OmegaConf's, or any other object).  The
    frozen encoder is None where ``cfg.dataset.preload_path`` is set: its features are then read.
    """
    device = cfg.base.device
    model = build_model(cfg).to(device)
    frozen_encoder = None
    if not cfg.dataset.preload_path:
        frozen_encoder = build_frozen_encoder(cfg).to(device)
    parameters = [*model.parameters(), *(frozen_encoder.parameters() if frozen_encoder else ())]
    _log.info(
        "%d parameters, %d of them learnable",
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )
    return frozen_encoder, model


def build_model(cfg: Any) -> FineGrainedPromptTuning:
    """Return the trainable model that ``cfg.network``, ``.dataset`` and ``.train`` describe."""
    network = cfg.network
    num_layers = len(parse_layers(network.layers_to_extract))
    config = read_config_file(network.pretrained_path)
    side_width = config.hidden_size // network.side_reduction_ratio
    fusion_module = FusionModule(
        num_layers=num_layers,
        in_dim=config.hidden_size,
        out_dim=side_width,
        num_heads=config.num_attention_heads,
        num_prompts=network.num_prompts,
        prompt_dim=config.hidden_size // network.prompt_reduction_ratio,
        prompt_norm=network.prompt_norm,
        prompt_proj=network.prompt_proj,
    )
    is_regression = str(cfg.train.criterion).lower() in REGRESSION_LOSSES
    side = {
        "num_hidden_layers": num_layers,
        "hidden_size": side_width,
        "intermediate_size": side_width * 4,
        "image_size": network.side_input_size,
        "num_labels": 1 if is_regression else cfg.dataset.num_classes,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    side_encoder = SideViT(SimpleNamespace(**{**vars(config), **side}))
    return FineGrainedPromptTuning(side_encoder, fusion_module)


def build_frozen_encoder(cfg: Any) -> FrozenViT:
    """Return the frozen model of ``cfg.network``, in evaluation mode, without gradients."""
    config = read_config_file(cfg.network.pretrained_path)
    config.token_imp = cfg.network.token_imp
    config.token_ratio = cfg.network.token_ratio
    config.layers_to_extract = parse_layers(cfg.network.layers_to_extract)
    frozen_encoder = FrozenViT.from_pretrained(cfg.network.pretrained_path, config=config)
    return frozen_encoder.eval().requires_grad_(False)


def load_weights(model: nn.Module, checkpoint: str) -> None:
    """Load a ``.pt`` file of weights into ``model``, strictly, without running code from it."""
    model.load_state_dict(read_state_dict(checkpoint), strict=True)
    _log.info("loaded %s", checkpoint)


def parse_layers(layers_to_extract: str | int) -> list[int]:
    """Return the layer numbers of ``"6-11"``, ``"0,2,5"`` or ``"5"``."""
    text = str(layers_to_extract)
    first, dash, last = text.partition("-")
    try:
        if dash:
            return list(range(int(first), int(last) + 1))
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"layers_to_extract must be like '6-11', '0,2,5' or '5', got {layers_to_extract!r}"
        ) from None
