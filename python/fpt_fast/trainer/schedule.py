"""Learning rate and optimiser of the published recipe."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from fpt_fast.config import ConfigError, TrainConfig


def learning_rate_at(epoch: float, config: TrainConfig) -> float:
    """Learning rate at a fractional epoch, ``epoch = whole epochs + step / steps per epoch``.

    Linear from 0 over ``warmup_epochs``, then half a cosine from ``learning_rate`` to 0.
    """
    if epoch < config.warmup_epochs:
        return config.learning_rate * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))


def check_schedule(config: TrainConfig) -> None:
    """Raise ``ConfigError`` where the warm-up leaves nothing of the training."""
    if config.warmup_epochs >= config.epochs:
        raise ConfigError(
            f"warmup_epochs must be below epochs ({config.epochs}), got {config.warmup_epochs}"
        )


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    config: TrainConfig,
    device: torch.device,
    *,
    static: bool = False,
) -> torch.optim.Optimizer:
    """Build the optimiser over ``parameters``, all with the same weight decay, as published.

    ``static``: its learning rate is a tensor, its step waits for no device and can be captured.
    """
    params = list(parameters)
    # A step of this small model is bound by launches; fused is one call for all parameters.
    fused = device.type in ("cuda", "cpu") or static
    rate = torch.tensor(config.learning_rate, device=device) if static else config.learning_rate
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            params,
            lr=rate,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            # Without this the step is what it was before it could be static.
            fused=True if static else None,
        )
    adam: type[torch.optim.Adam] | type[torch.optim.AdamW] = (
        torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    )
    return adam(
        params,
        lr=rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=fused,
        capturable=static and device.type == "cuda",
    )
