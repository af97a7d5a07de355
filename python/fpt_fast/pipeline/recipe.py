"""The training recipe: what was asked for, and what follows from the labels."""

import dataclasses
import logging

from fpt_fast.config import FINDING_LOSSES, REGRESSION_LOSSES, ConfigError, Loss, TrainConfig
from fpt_fast.images import dataset_preset, value_scale
from fpt_fast.records import ImageSet, Task
from fpt_fast.run_settings import TrainSettings

log = logging.getLogger("fpt_fast")


def make_recipe(settings: TrainSettings, images: ImageSet) -> TrainConfig:
    """The training recipe: learning rate from the preset, monitor from the loss, unless said;
    of several findings per image, the loss of each; of numbers, their scale in training."""
    loss = _loss_of(settings.loss, images.task)
    target = None
    if images.task == "regression":
        if settings.sampling == "balanced":
            raise ConfigError("--sampling balanced is for classes and findings; leave it out")
        target = value_scale(images.of_split("train"))
    elif loss in REGRESSION_LOSSES:
        log.info(
            "grades, the lowest first: %s%s",
            " < ".join(images.classes),
            "" if settings.class_order else "; --class-order names another order",
        )
    rate = settings.learning_rate
    if rate is None:
        rate = 1e-4 if settings.preset is None else dataset_preset(settings.preset).learning_rate
    monitor = settings.monitor
    if monitor is None:
        # A grade has no AUC.
        monitor = "mae" if loss in REGRESSION_LOSSES else "auc"
    return TrainConfig(
        learning_rate=rate,
        monitor=monitor,
        loss=loss,
        target=target,
        **{
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(TrainConfig)
            if field.name not in ("learning_rate", "monitor", "loss")
            and hasattr(settings, field.name)
        },
    )


def _loss_of(loss: Loss, task: Task) -> Loss:
    """The loss that ``loss`` means for ``task``; ``ConfigError`` where it has no meaning there."""
    of_findings: dict[Loss, Loss] = {
        "cross_entropy": "binary_cross_entropy",
        "focal": "binary_focal",
    }
    if task == "regression":
        loss = "mean_square_error" if loss == "cross_entropy" else loss
        if loss not in REGRESSION_LOSSES:
            raise ConfigError(
                f"loss {loss!r} is for classes, and the data has numbers; use "
                f"{', '.join(REGRESSION_LOSSES)}"
            )
        return loss
    if task == "multilabel":
        loss = of_findings.get(loss, loss)
    if (loss in FINDING_LOSSES) != (task == "multilabel"):
        raise ConfigError(
            f"loss {loss!r} is for {'one class' if task == 'multilabel' else 'several findings'} "
            f"per image, and the data has {'findings' if task == 'multilabel' else 'classes'}; use "
            f"{'cross_entropy or focal' if task == 'multilabel' else 'another, or --label-columns'}"
        )
    return loss
