"""Folders of finished runs as ``train`` leaves them, on images that are there, without training."""

import math
from pathlib import Path

import torch
import yaml
from PIL import Image

from fpt_fast.records import UNLABELLED, EpochRecord, Predictions, TrainingHistory
from fpt_fast.report import write_run_files
from fpt_fast.trust import assess

CLASSES = ("healthy", "mild", "severe <b>")


def write_images(data: Path, count: int) -> tuple[str, ...]:
    """``count`` test images in folders by class, and one of each for the other splits; keys of
    the former."""
    keys = []
    for number in range(count):
        name = CLASSES[number % len(CLASSES)]
        keys.append(f"test/{name}/image-{number}.png")
        path = data / keys[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (5 * number % 255, 120, 60)).save(path)
        for other in ("train/{}/a.png", "val/{}/b.png"):
            unused = data / other.format(name)
            unused.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30)).save(unused)
    return tuple(keys)


def predict(keys: tuple[str, ...], seed: int, skill: float) -> Predictions:
    """Random predictions that are the better, the larger the ``skill``."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(keys)) % len(CLASSES)
    logits = torch.randn(len(keys), len(CLASSES), generator=generator)
    logits[torch.arange(len(keys)), labels] += skill
    return Predictions(keys, labels, logits, logits.softmax(1))


def predict_findings(keys: tuple[str, ...], seed: int, skill: float) -> Predictions:
    """The same for two findings of which every seventh is unknown, and one that is never there."""
    generator = torch.Generator().manual_seed(seed)
    number = torch.arange(len(keys))
    labels = torch.stack([number % 2, (number % 3 == 0).long(), torch.zeros_like(number)], dim=1)
    labels[number % 7 == 0, 0] = UNLABELLED
    logits = torch.randn(len(keys), 3, generator=generator) + skill * (2 * (labels == 1) - 1)
    return Predictions(keys, labels, logits, logits.sigmoid())


def predict_numbers(keys: tuple[str, ...], seed: int, spread: float) -> Predictions:
    """Numbers from -20 to 30, off by about ``spread``; the first is unknown."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.linspace(-20, 30, len(keys), dtype=torch.float64)
    off = torch.randn(len(keys), generator=generator, dtype=torch.float64)
    predicted = (labels + spread * off)[:, None]
    labels[0] = math.nan
    return Predictions(keys, labels, predicted, None)


def write_run(
    folder: Path,
    predictions: Predictions,
    data: Path,
    *,
    rate: float = 1e-3,
    epochs: int = 6,
    classes: tuple[str, ...] = CLASSES,
) -> Path:
    """A run folder, less its model."""
    history = TrainingHistory(
        tuple(
            EpochRecord(e, 1 / (e + 1 + 500 * rate), rate, 2.0, {"loss": 1.1 - e / 20, "auc": 0.6})
            for e in range(epochs)
        ),
        "auc",
        0,
        0.6,
    )
    folder.mkdir(parents=True)
    write_run_files(
        folder,
        predictions=predictions,
        classes=classes,
        assessment=assess(predictions, len(classes), resamples=60),
        history=history,
    )
    settings = {"data": str(data), "cache": "none", "run": str(folder), "learning_rate": rate}
    (folder / "config.yaml").write_text(
        yaml.safe_dump(
            {"settings": settings, "training": {"learning_rate": rate, "epochs": epochs}}
        )
    )
    return folder


def write_runs(root: Path, *, images: int = 60) -> list[Path]:
    """Three runs on the same images, of rising skill and learning rate."""
    keys = write_images(root / "images", images)
    return [
        write_run(
            root / "runs" / f"seed-{seed}",
            predict(keys, seed, skill=1 + 0.8 * seed),
            root / "images",
            rate=10.0 ** (seed - 4),
        )
        for seed in range(3)
    ]
