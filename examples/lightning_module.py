"""FPT+ in Lightning: its trainer, callbacks and loggers; our loader and model.

python examples/lightning_module.py --data DATA --cache CACHE --epochs 20
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from torchmetrics.classification import MulticlassAUROC

from fpt_fast import create_model
from fpt_fast.cache import CacheReader
from fpt_fast.config import AugmentConfig
from fpt_fast.images import DecodedStore, load_image_set, shrink_images
from fpt_fast.loader import CachedFeatures, FeatureLoader
from fpt_fast.pipeline.features import FeaturePlan
from fpt_fast.records import FeatureBatch
from fpt_fast.trainer.batches import move_batch


class FptModule(lightning.LightningModule):
    """The published recipe: AdamW, half a cosine to 0 by step, cross-entropy."""

    def __init__(self, model: torch.nn.Module, num_classes: int, learning_rate: float) -> None:
        super().__init__()
        self.model = model
        self.learning_rate = learning_rate
        self.auc = MulticlassAUROC(num_classes)

    def transfer_batch_to_device(
        self, batch: FeatureBatch, device: torch.device, dataloader_idx: int
    ) -> FeatureBatch:
        return move_batch(batch, device)

    def training_step(self, batch: FeatureBatch, index: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self.model(batch), batch.labels)
        self.log("loss", loss, batch_size=len(batch.labels), prog_bar=True)
        return loss

    def validation_step(self, batch: FeatureBatch, index: int) -> None:
        self.auc.update(self.model(batch).softmax(1), batch.labels)

    def on_validation_epoch_end(self) -> None:
        self.log("val_auc", self.auc.compute(), prog_bar=True)
        self.auc.reset()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=0.1, fused=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Epochs(IterableDataset[FeatureBatch]):
    """Our loader as Lightning wants it: another order and augmentation in every epoch."""

    def __init__(self, loader: FeatureLoader) -> None:
        self.loader = loader
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[FeatureBatch]:
        self.loader.set_epoch(self.epoch)
        self.epoch += 1
        return iter(self.loader)


def train(data: Path, cache: Path, *, epochs: int, learning_rate: float, side_size: int) -> float:
    """Train on the cache of ``data``; returns the last validation AUC."""
    images = load_image_set(data)
    with CacheReader(cache) as reader:
        plan = FeaturePlan.from_json(reader.fingerprint)
        side = replace(plan.preprocessing, size=(side_size, side_size))
        loaders = {}
        for split in ("train", "val"):
            items = images.of_split(split)
            augmentation = AugmentConfig() if split == "train" else None
            loaders[split] = FeatureLoader(
                items,
                CachedFeatures(reader, items),
                side,
                batch_size=16,
                store=DecodedStore(),
                augmentation=augmentation,
                side_images=shrink_images(items, side, augmented=augmentation is not None),
                shuffle=split == "train",
            )
        classes = len(images.classes)
        model = create_model(
            "fpt_plus",
            backbone=plan.spec,
            num_classes=classes,
            side_size=side.size,
            layers=plan.layers,
        )
        trainer = lightning.Trainer(
            max_epochs=epochs,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
        module = FptModule(model, classes, learning_rate)
        trainer.fit(module, *(loader_of(loaders[split]) for split in ("train", "val")))
        return float(trainer.callback_metrics["val_auc"])


def loader_of(loader: FeatureLoader) -> torch.utils.data.DataLoader[FeatureBatch]:
    """Batches are made already: one comes through as it is."""
    return torch.utils.data.DataLoader(Epochs(loader), batch_size=None)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train FPT+ in Lightning on a feature cache.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--side-size", type=int, default=128)
    given = parser.parse_args()
    auc = train(
        given.data,
        given.cache,
        epochs=given.epochs,
        learning_rate=given.learning_rate,
        side_size=given.side_size,
    )
    print(f"validation AUC: {auc:.3f}")


if __name__ == "__main__":
    main()
