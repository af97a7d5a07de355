"""The published epoch in plain PyTorch: every image decoded anew, one f32 file of features each.

Written from the method's description: a ``DataLoader`` whose processes open the image with
Pillow, augment it with torchvision on the full image and read the features of that image from a
file of its own; a batch is collated, turned to [L, B, H, K, D] and learned from.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

Sample = tuple[Tensor, Tensor, Tensor, int]


def write_features(path: Path, kv: Tensor) -> None:
    """One image's file, from kv [L, 2, H, K, D]."""
    keys, values = (part.float().contiguous() for part in kv.unbind(1))
    save_file({"key_states": keys, "value_states": values}, path)


class PlainDataset(Dataset[Sample]):
    """Image, keys, values [L, H, K, D] f32, and label; ``pixels`` instead of an image where the
    steps alone are measured."""

    def __init__(
        self,
        images: Sequence[Path],
        features: Sequence[Path],
        labels: Sequence[int],
        size: tuple[int, int],
        pixels: Tensor | None = None,
    ) -> None:
        self.images, self.features, self.labels = images, features, labels
        self.pixels = pixels
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ColorJitter(brightness=0.2, contrast=0.2),
                transforms.RandomResizedCrop(size, scale=(0.8, 1.0), ratio=(0.7, 1.3)),
                transforms.ToTensor(),
                transforms.Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        if self.pixels is None:
            with Image.open(self.images[index]) as image:
                pixels = self.transform(image.convert("RGB"))
        else:
            pixels = self.pixels
        states = load_file(self.features[index])
        return pixels, states["key_states"], states["value_states"], self.labels[index]


def plain_epoch(
    model: nn.Module, dataset: PlainDataset, optimizer: torch.optim.Optimizer, batch: int
) -> float:
    """Train one epoch; returns its mean loss."""
    # Two processes, as there are two cores; none for a handful of images.
    workers = 2 if len(dataset) > 4 * batch else 0
    loader = DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers)
    total = 0.0
    for pixels, keys, values, labels in loader:
        logits = model(pixels, keys.transpose(0, 1), values.transpose(0, 1))
        loss = functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item() * len(labels)
    return total / len(dataset)
