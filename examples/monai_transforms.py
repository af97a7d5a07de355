"""MONAI transforms for the side input, in a plain PyTorch loop over features of a cache.

    python examples/monai_transforms.py --data DATA --cache CACHE --epochs 5

The frozen model's input must stay as it was preloaded: only the side input is augmented.
"""

import argparse
from pathlib import Path

import torch
from monai.transforms import (
    Compose,
    EnsureType,
    NormalizeIntensity,
    RandAdjustContrast,
    RandFlip,
    RandZoom,
    Resize,
)
from monai.utils import set_determinism

from fpt_fast import create_model
from fpt_fast.cache import CacheReader
from fpt_fast.images import load_image_set, read_item
from fpt_fast.metrics import compute_metrics
from fpt_fast.pipeline.features import FeaturePlan
from fpt_fast.records import FeatureBatch, ImageItem, Predictions


def side_transform(plan: FeaturePlan, size: int, *, augmented: bool) -> Compose:
    """From a decoded image [3, h, w] u8 to the side input [3, size, size] f32."""
    steps = [EnsureType(dtype=torch.float32), Resize((size, size), anti_aliasing=True)]
    if augmented:
        steps += [
            RandFlip(prob=0.5, spatial_axis=1),
            RandZoom(prob=0.5, min_zoom=1.0, max_zoom=1.2),
            RandAdjustContrast(prob=0.5, gamma=(0.8, 1.25)),
        ]
    mean = [255 * value for value in plan.preprocessing.mean]
    std = [255 * value for value in plan.preprocessing.std]
    steps.append(NormalizeIntensity(subtrahend=mean, divisor=std, channel_wise=True))
    return Compose(steps)


def make_batch(items: list[ImageItem], reader: CacheReader, transform: Compose) -> FeatureBatch:
    """Features by key from the cache, side input by MONAI."""
    kept = reader.read([reader.row(item.key) for item in items])
    pixels = [transform(read_item(item)).as_tensor() for item in items]
    return FeatureBatch(
        side_pixels=torch.stack(pixels),
        kv=kept.kv,
        rows=None,
        labels=torch.tensor([item.label for item in items]),
        keys=tuple(item.key for item in items),
        k_scales=kept.k_scales,
        v_scales=kept.v_scales,
    )


def train(data: Path, cache: Path, *, epochs: int, learning_rate: float, side_size: int) -> float:
    """Train on the cache of ``data``; returns the AUC on its test images."""
    set_determinism(0)
    images = load_image_set(data)
    with CacheReader(cache) as reader:
        plan = FeaturePlan.from_json(reader.fingerprint)
        model = create_model(
            "fpt_plus",
            backbone=plan.spec,
            num_classes=len(images.classes),
            side_size=(side_size, side_size),
            layers=plan.layers,
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.1)
        augmented = side_transform(plan, side_size, augmented=True)
        items = images.of_split("train")
        for epoch in range(epochs):
            model.train()
            for positions in torch.randperm(len(items)).split(16):
                batch = make_batch([items[i] for i in positions.tolist()], reader, augmented)
                loss = torch.nn.functional.cross_entropy(model(batch), batch.labels)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

        model.eval()
        plain = side_transform(plan, side_size, augmented=False)
        tested = list(images.of_split("test"))
        with torch.inference_mode():
            logits = model(make_batch(tested, reader, plain))
        predictions = Predictions(
            keys=tuple(item.key for item in tested),
            labels=torch.tensor([item.label for item in tested]),
            logits=logits,
            probabilities=logits.softmax(1),
        )
        return compute_metrics(predictions, len(images.classes))["auc"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Train FPT+ with MONAI transforms on a cache.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=5)
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
    print(f"test AUC: {auc:.3f}")


if __name__ == "__main__":
    main()
