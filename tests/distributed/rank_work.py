"""What the ranks of the tests do: preload and train, some struck by a signal or a wrong setting."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from struck_training import train_struck
from toy_training import CLASSES, ToyBatches, ToyModel, toy_config, toy_model, without_seconds

from fpt_fast.distributed import ALONE, World, open_world
from fpt_fast.pipeline import (
    EvaluateSettings,
    PreloadSettings,
    TrainSettings,
    evaluate,
    preload,
    preloading,
    train,
)
from fpt_fast.records import FeatureBatch, Predictions
from fpt_fast.trainer import fit
from fpt_fast.trainer import predict as predict_batches


def preload_struck(settings: PreloadSettings, rank: int, calls: int, number: int) -> None:
    """Preload, with signal ``number`` to ``rank`` within its ``calls``-th batch (0: none)."""
    original, made = preloading.select_features, []

    def select(*arguments: Any, **named: Any) -> Any:
        made.append(1)
        if len(made) == calls and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    preloading.select_features = select
    preload(settings)


def preload_differently(settings: PreloadSettings) -> None:
    """Preload with another batch size on rank 1."""
    size = settings.batch_size + int(os.environ["RANK"])
    preload(dataclasses.replace(settings, batch_size=size))


RECIPES: tuple[dict[str, Any], ...] = (
    {"loss_weight": "dynamic", "optimizer": "adamw"},
    {"loss": "kappa", "optimizer": "sgd"},
    {"loss": "focal", "optimizer": "adam"},
    {"loss": "mean_square_error", "monitor": "mae"},
)


class PreciseBatches(ToyBatches):
    """In f64, so that rounding stays far below what a wrong row would change; the last batch has
    one image."""

    def __iter__(self) -> Iterator[FeatureBatch]:
        for step, batch in enumerate(super().__iter__()):
            kept = 1 if step + 1 == self.steps else self.size
            yield FeatureBatch(
                batch.side_pixels[:kept].double(),
                None,
                None,
                batch.labels[:kept],
                batch.keys[:kept],
            )


def precise_fit(
    folder: Path, recipe: dict[str, Any], world: World = ALONE
) -> tuple[ToyModel, tuple[object, ...], Predictions]:
    """Three epochs of the toy model in f64: the model, its history, predictions on other images."""
    config = toy_config(**{"monitor": "f1", **recipe})
    model = toy_model(1 if config.is_regression else CLASSES).double()
    history = fit(
        model,
        PreciseBatches(),
        PreciseBatches(3, seed=1),
        config,
        run_dir=folder,
        num_classes=CLASSES,
        class_counts=[5, 3, 1],
        progress=False,
        world=world,
    )
    said = predict_batches(model, PreciseBatches(2), regression=config.is_regression, world=world)
    return model, without_seconds(history), said


def fit_together(folder: Path) -> None:
    """Train by every recipe; each rank leaves what it ended with."""
    with open_world("cpu") as world:
        for number, recipe in enumerate(RECIPES):
            model, history, said = precise_fit(folder / f"run {number}", recipe, world)
            result = {**model.state_dict(), "logits": said.logits, "labels": said.labels}
            save_file(
                {name: tensor.contiguous() for name, tensor in result.items()},
                folder / f"{number} of {world.rank}",
                metadata={"history": repr(history), "keys": repr(said.keys)},
            )


def train_rank(settings: TrainSettings, rank: int, calls: int, number: int) -> None:
    """Train, with signal ``number`` to ``rank`` within its ``calls``-th step."""
    train_struck(settings, calls if os.environ["RANK"] == str(rank) else 0, number)


def train_and_evaluate(settings: TrainSettings) -> None:
    """Train and evaluate, one world after another."""
    train(settings)
    evaluate(EvaluateSettings(run=settings.run, split="test", batch_size=4))
