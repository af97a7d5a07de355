"""A model and batches small enough to train in milliseconds, for the tests of the trainer."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fpt_fast.config import TrainConfig
from fpt_fast.records import EpochRecord, FeatureBatch, TrainingHistory

CLASSES = 3
PIXELS = (3, 2, 2)


class ToyModel(nn.Module):
    """Dropout, a hidden layer, and a parameter that does not train."""

    def __init__(self, outputs: int = CLASSES) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)
        self.hidden = nn.Linear(12, 8)
        self.head = nn.Linear(8, outputs)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, batch: FeatureBatch) -> Tensor:
        return self.head(self.dropout(self.hidden(batch.side_pixels.flatten(1)).relu()))


class ToyBatches:
    """``steps`` batches whose images depend on seed and epoch only."""

    def __init__(
        self, steps: int = 4, size: int = 5, seed: int = 0, labels: tuple[int, ...] | None = None
    ) -> None:
        self.steps, self.size, self.seed, self.labels, self.epoch = steps, size, seed, labels, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[FeatureBatch]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.epoch)
        for step in range(self.steps):
            pixels = torch.randn(self.size, *PIXELS, generator=generator)
            labels = pixels.flatten(1)[:, :CLASSES].argmax(dim=1)
            if self.labels is not None:
                labels = torch.tensor([self.labels[i % len(self.labels)] for i in range(self.size)])
            keys = tuple(f"{step}/{i}.png" for i in range(self.size))
            yield FeatureBatch(pixels, None, None, labels, keys)


def toy_model(outputs: int = CLASSES) -> ToyModel:
    """The same weights at every call."""
    torch.manual_seed(7)
    return ToyModel(outputs)


def toy_config(**changes: object) -> TrainConfig:
    return TrainConfig(**{"epochs": 3, "batch_size": 5, "learning_rate": 1e-2, **changes})  # type: ignore[arg-type]


def without_seconds(history: TrainingHistory) -> tuple[object, ...]:
    """A history without what no two runs share; NaN as text, because it is not equal to itself."""
    return (
        *(
            (r.epoch, r.loss, r.learning_rate, tuple((k, repr(v)) for k, v in r.val.items()))
            for r in history.epochs
        ),
        history.best_epoch,
        history.best_value,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


class Recorder:
    """A callback that keeps what it is told, and the weights after each epoch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.records: list[EpochRecord] = []
        self.weights: list[dict[str, Tensor]] = []
        self.history: TrainingHistory | None = None

    def on_epoch_end(self, record: EpochRecord) -> None:
        self.records.append(record)
        self.weights.append(weights_of(self.model))

    def on_end(self, history: TrainingHistory) -> None:
        self.history = history


class Interrupted(Exception):
    """Stands for a kill between two epochs."""


class StopAfter:
    """A callback that interrupts training after an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_epoch_end(self, record: EpochRecord) -> None:
        if record.epoch == self.epoch:
            raise Interrupted

    def on_end(self, history: TrainingHistory) -> None:
        raise AssertionError("training was to stop before its end")


def files_below(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
