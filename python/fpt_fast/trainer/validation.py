"""Validation: metrics of an epoch, and which epoch is best."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from fpt_fast.config import ConfigError, TrainConfig
from fpt_fast.distributed import ALONE, World
from fpt_fast.losses import build_loss
from fpt_fast.metrics import LOWER_IS_BETTER, compute_metrics, is_labelled, metric_names
from fpt_fast.records import FeatureBatch, Predictions
from fpt_fast.trainer.prediction import predict

LOGGER = logging.getLogger("fpt_fast")


def monitor_names(config: TrainConfig) -> tuple[str, ...]:
    """Metrics that ``config.monitor`` may name, ``loss`` (of the validation images) included."""
    names = metric_names(
        regression=config.is_regression,
        findings=config.has_findings,
        values=config.target is not None,
    )
    return ("loss", *names)


def check_monitor(config: TrainConfig) -> None:
    """Raise ``ConfigError`` listing the names where ``config.monitor`` is none of them."""
    if config.monitor not in monitor_names(config):
        raise ConfigError(
            f"monitor must be one of {', '.join(monitor_names(config))} for loss={config.loss!r}, "
            f"got {config.monitor!r}"
        )


def is_better(value: float, best: float | None, monitor: str) -> bool:
    """Whether ``value`` of the metric ``monitor`` beats ``best`` (None: there is none yet).

    NaN never does; the first finite value does, whatever it is; an equal one does not.
    """
    if not math.isfinite(value):
        return False
    if best is None:
        return True
    return value < best if monitor in LOWER_IS_BETTER else value > best


def validate(
    model: nn.Module,
    batches: Iterable[FeatureBatch],
    config: TrainConfig,
    num_classes: int,
    device: torch.device,
    *,
    explain: bool,
    class_names: Sequence[str] | None = None,
    world: World = ALONE,
    after_batch: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Metrics of the validation images by name; ``explain`` logs what could not be computed.

    The ranks of ``world`` share the images; ``after_batch`` is called after each batch.
    """
    predictions = predict(
        model,
        batches,
        device=device,
        regression=config.is_regression,
        target=config.target,
        world=world,
        after_batch=after_batch,
    )
    metrics = compute_metrics(predictions, num_classes, class_names)
    if explain:
        for note in metrics.notes:
            LOGGER.warning("validation: %s", note)
    return {"loss": validation_loss(predictions, config), **metrics.values}


def validation_loss(predictions: Predictions, config: TrainConfig) -> float:
    """The configured loss over all labelled images at once, without class weights.

    Without, so that epochs compare although dynamic weights change from one to the next.
    """
    labelled = is_labelled(predictions.labels)
    if labelled.dim() == 2:
        labelled = labelled.any(dim=1)
    loss = build_loss(TrainConfig(loss=config.loss, target=config.target))
    logits = predictions.logits[labelled]
    if config.target is not None:
        logits = (logits - config.target[0]) / config.target[1]
    return float(loss(logits, predictions.labels[labelled]))
