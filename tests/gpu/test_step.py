"""The captured step on a real device: the ordinary step's run, resumed too, and no wait within it.

Where there is no GPU, steps are written down and done again by ``tests/graph_tape.py``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tape import TapeCapture

from fpt_fast.config import TrainConfig
from fpt_fast.model import create_model
from fpt_fast.records import FeatureBatch, TrainingHistory
from fpt_fast.trainer import fit
from helpers import TINY_SPEC, VIT_B
from on_device import DEVICE, ON_GPU

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("device")]

IMAGES, BATCH, EPOCHS = (100, 16, 4) if ON_GPU else (11, 4, 2)
SPEC, KEPT = (VIT_B, 205) if ON_GPU else (TINY_SPEC, 5)
CHANGES: dict[str, Any] = {} if ON_GPU else {"side_size": (16, 24), "side_reduction": 4}


class Batches:
    """A store on the device, read by rows, or batches copied into two slots there."""

    def __init__(self, method: str, way: str) -> None:
        model = create_model(method, backbone=SPEC, num_classes=3, **CHANGES)
        shape = (IMAGES, len(model.layers), 2, SPEC.num_heads, KEPT, SPEC.head_width)
        generator = torch.Generator().manual_seed(0)
        self.kv = torch.randn(shape, generator=generator).half().to(DEVICE)
        self.pixels = torch.randn((IMAGES, 3, *model.config.side_size), generator=generator)
        self.labels = torch.arange(IMAGES) % 3
        self.slots = [torch.empty_like(self.kv[:BATCH]) for _ in range(2)]
        self.way, self.epoch = way, 0

    def __len__(self) -> int:
        return -(-IMAGES // BATCH)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[FeatureBatch]:
        generator = torch.Generator().manual_seed(self.epoch)
        for turn, rows in enumerate(torch.randperm(IMAGES, generator=generator).split(BATCH)):
            kv = self.kv
            if self.way == "slots":
                kv = self.slots[turn % 2][: len(rows)].copy_(self.kv[rows.to(DEVICE)])
            yield FeatureBatch(
                self.pixels[rows],
                kv,
                rows if self.way == "store" else None,
                self.labels[rows],
                tuple(str(row) for row in rows.tolist()),
            )


def train(
    folder: Path, step: Any, method: str, way: str, batches: Any = None, **changes: Any
) -> tuple[TrainingHistory, dict[str, torch.Tensor]]:
    model = create_model(method, backbone=SPEC, num_classes=3, **CHANGES)
    history = fit(
        model,
        Batches(method, way) if batches is None else batches,
        None,
        TrainConfig(epochs=EPOCHS, batch_size=BATCH, learning_rate=1e-3, **changes),
        run_dir=folder,
        num_classes=3,
        device=str(DEVICE),
        progress=False,
        step=step,
        resume=True,
    )
    return history, {name: value.cpu() for name, value in model.state_dict().items()}


def captured() -> Any:
    return "graph" if ON_GPU else TapeCapture()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("way", ["store", "slots"])
@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
def test_a_captured_run_is_the_eager_run(
    tmp_path: Path, method: str, way: str, precision: str
) -> None:
    """The same dropout too: a graph goes on with torch's own random numbers."""
    eager = train(tmp_path / "eager", "eager", method, way, precision=precision)
    graph = train(tmp_path / "graph", captured(), method, way, precision=precision)
    rtol = 1e-4 if precision == "float32" else 2e-2
    for one, other in zip(eager[0].epochs, graph[0].epochs, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=rtol)
    if precision == "float32":
        for name, weights in eager[1].items():
            torch.testing.assert_close(graph[1][name], weights, rtol=1e-2, atol=1e-4)


def test_runs_repeat_and_resume_bit_for_bit(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class Stops(Batches):
        def set_epoch(self, epoch: int) -> None:
            if epoch == EPOCHS - 1:
                raise Stop
            super().set_epoch(epoch)

    first, second = (
        train(tmp_path / name, captured(), "fpt_plus", "store")[1] for name in ("first", "second")
    )
    with pytest.raises(Stop):
        train(tmp_path / "parts", captured(), "fpt_plus", "store", Stops("fpt_plus", "store"))
    parts = train(tmp_path / "parts", captured(), "fpt_plus", "store")[1]
    for name, weights in first.items():
        assert torch.equal(weights, second[name]) and torch.equal(weights, parts[name]), name


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    if not ON_GPU:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_step_waits_for_the_device(tmp_path: Path) -> None:
    """Once all sizes are captured, an epoch is launched without a look at the device."""
    taken = 0

    class Watched(Batches):
        def __iter__(self) -> Iterator[FeatureBatch]:
            nonlocal taken
            if self.epoch == 0:
                yield from super().__iter__()
                return
            # All made before, so that only the trainer's own work is watched.
            for batch in list(super().__iter__()):
                with waiting_is_an_error():
                    yield batch
                    taken += 1

    train(tmp_path, captured(), "fpt_plus", "store", Watched("fpt_plus", "store"))
    assert taken == (EPOCHS - 1) * -(-IMAGES // BATCH)
