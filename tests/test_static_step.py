"""The captured step, on a simulated CUDA graph: the ordinary step's run, and nothing that waits."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_tape import HostWait, TapeCapture
from torch import Tensor, nn
from toy_training import (
    CLASSES,
    ToyBatches,
    ToyModel,
    assert_equal_weights,
    toy_config,
    toy_model,
    weights_of,
)

from fpt_fast.interrupts import Stopped
from fpt_fast.model import FptModel, create_model
from fpt_fast.records import FeatureBatch, TrainingHistory
from fpt_fast.trainer import TrainingError, fit
from fpt_fast.trainer.capture import choose_capture
from fpt_fast.trainer.checkpoint import load_last
from helpers import TINY_SPEC

STEPS = 4


class Ragged(ToyBatches):
    """The last batch of an epoch is smaller."""

    def __iter__(self) -> Iterator[FeatureBatch]:
        for step, batch in enumerate(super().__iter__()):
            keep = 2 if step == self.steps - 1 else self.size
            yield FeatureBatch(
                batch.side_pixels[:keep], None, None, batch.labels[:keep], batch.keys[:keep]
            )


def run(
    folder: Path,
    step: Any,
    model: nn.Module | None = None,
    batches: Any = None,
    val: Any = None,
    **changes: Any,
) -> tuple[TrainingHistory, dict[str, Tensor]]:
    model = toy_model() if model is None else model
    config = toy_config(**changes)
    history = fit(
        model,
        Ragged(STEPS) if batches is None else batches,
        ToyBatches(2, seed=5) if val is None else val,
        config,
        run_dir=folder,
        num_classes=CLASSES,
        class_counts=(5, 3, 2),
        progress=False,
        step=step,
        resume=True,
    )
    return history, weights_of(model)


def assert_same_training(ordinary: Any, captured: Any, rtol: float = 2e-5) -> None:
    """Rounding apart: torch's fused optimiser adds and multiplies in another order."""
    for first, second in zip(ordinary[0].epochs, captured[0].epochs, strict=True):
        assert second.loss == pytest.approx(first.loss, rel=rtol)
        assert second.learning_rate == first.learning_rate
        assert second.val["loss"] == pytest.approx(first.val["loss"], rel=rtol)
    assert captured[0].best_epoch == ordinary[0].best_epoch
    for name, weights in ordinary[1].items():
        torch.testing.assert_close(captured[1][name], weights, rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"warmup_epochs": 1, "weight_decay": 0.5, "clip_norm": 0.01},
        {"optimizer": "adam"},
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.0},
        {"loss": "focal"},
        {"loss": "kappa"},
        {"loss_weight": "balance"},
        {"loss_weight": "dynamic"},
    ],
    ids=str,
)
def test_a_captured_run_is_the_ordinary_run(tmp_path: Path, changes: dict[str, Any]) -> None:
    capture = TapeCapture()
    ordinary = run(tmp_path / "ordinary", "eager", **changes)
    captured = run(tmp_path / "captured", capture, **changes)
    assert_same_training(ordinary, captured)
    assert len(capture.tapes) == 2 and capture.replays == 3 * STEPS


def test_a_regression(tmp_path: Path) -> None:
    changes = {"loss": "smooth_l1", "monitor": "mae"}
    ordinary = run(tmp_path / "ordinary", "eager", toy_model(1), **changes)
    capture = TapeCapture()
    assert_same_training(ordinary, run(tmp_path / "captured", capture, toy_model(1), **changes))
    assert capture.replays == 3 * STEPS


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_precision(tmp_path: Path, precision: str) -> None:
    """Weights stay in f32, and both ways of running a step agree; f16 has scaled its losses."""
    ordinary = run(tmp_path / "ordinary", "eager", precision=precision)
    captured = run(tmp_path / "captured", TapeCapture(), precision=precision)
    assert_same_training(ordinary, captured, rtol=1e-3)
    exact = run(tmp_path / "exact", "eager")
    assert exact[0].epochs[-1].loss != ordinary[0].epochs[-1].loss
    assert exact[0].epochs[-1].loss == pytest.approx(ordinary[0].epochs[-1].loss, rel=0.02)
    assert all(weights.dtype == torch.float32 for weights in ordinary[1].values())


def test_a_gradient_that_overflows_changes_nothing_but_the_scale(tmp_path: Path) -> None:
    states = []
    for step in ("eager", TapeCapture()):
        model = toy_model()
        with torch.no_grad():
            model.head.weight.mul_(3e3)
        run(tmp_path / str(len(states)), step, model, precision="float16", epochs=1)
        last = load_last(tmp_path / str(len(states)))
        assert last is not None
        states.append(last.state["step"])
    assert states[0] == states[1] and states[0]["scale"] < 2.0**16


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_resumed_run_is_the_whole_run_bit_for_bit(tmp_path: Path, precision: str) -> None:
    _, whole = run(tmp_path / "whole", TapeCapture(), precision=precision)

    class Struck(Ragged):
        def __init__(self, at: int) -> None:
            super().__init__(STEPS)
            self.at, self.made = at, 0

        def __iter__(self) -> Iterator[FeatureBatch]:
            for batch in super().__iter__():
                if self.made == self.at:
                    signal.raise_signal(signal.SIGTERM)
                self.made += 1
                yield batch

    for at in (2, 0, 5):
        with pytest.raises(Stopped):
            run(tmp_path / "parts", TapeCapture(), batches=Struck(at), precision=precision)
    _, parts = run(tmp_path / "parts", TapeCapture(), precision=precision)
    assert_equal_weights(whole, parts)


def test_one_way_goes_on_with_what_the_other_left(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    class StopAfter(Ragged):
        def set_epoch(self, epoch: int) -> None:
            if epoch == 2:
                raise Stop
            super().set_epoch(epoch)

    whole = run(tmp_path / "whole", "eager")
    for name, steps in {"a": ("eager", TapeCapture()), "b": (TapeCapture(), "eager")}.items():
        with pytest.raises(Stop):
            run(tmp_path / name, steps[0], batches=StopAfter(STEPS))
        assert_same_training(whole, run(tmp_path / name, steps[1]))


def test_a_loss_that_is_not_finite_is_named_at_the_end_of_its_epoch(tmp_path: Path) -> None:
    made: list[int] = []

    class Broken(ToyBatches):
        def __iter__(self) -> Iterator[FeatureBatch]:
            for step, batch in enumerate(super().__iter__()):
                made.append(step)
                if step == 1:
                    batch.side_pixels.fill_(torch.nan)
                yield batch

    with pytest.raises(TrainingError, match="epoch 0, step 1"):
        run(tmp_path, TapeCapture(), batches=Broken(STEPS))
    assert made == [0, 1, 2, 3]


class Waiting(ToyModel):
    """Looks at a number in each step."""

    def forward(self, batch: FeatureBatch) -> Tensor:
        logits = super().forward(batch)
        return logits * 2 if float(logits.detach().sum()) > 1e9 else logits


def test_a_step_that_waits_runs_operation_by_operation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def waiting() -> Waiting:
        torch.manual_seed(7)
        return Waiting()

    ordinary = run(tmp_path / "ordinary", "eager", waiting())
    capture = TapeCapture()
    with caplog.at_level(logging.WARNING, logger="fpt_fast"):
        assert_same_training(ordinary, run(tmp_path / "captured", capture, waiting()))
    assert not capture.tapes and "reads a number" in caplog.text


def test_the_tape_refuses_what_waits() -> None:
    tensor = torch.ones(3)
    for wait in (
        lambda: tensor.sum().item(),
        lambda: tensor.nonzero(),
        lambda: tensor[tensor > 0],
        lambda: torch.tensor([1.0]),
        lambda: bool(tensor.all()),
    ):
        with pytest.raises(HostWait):
            TapeCapture()(wait)


def test_choices() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_capture("eager", cuda) == (None, "step=eager")
    capture, why = choose_capture("auto", cpu)
    assert capture is None and "only CUDA has graphs, and the model is on cpu" in why
    with pytest.raises(ValueError, match="'graph' cannot be: only CUDA has graphs"):
        choose_capture("graph", cpu)
    with pytest.raises(ValueError, match="summed over 2 processes"):
        choose_capture("graph", cuda, ranks=2)
    assert choose_capture("auto", cuda, ranks=2)[0] is None
    assert "no GPU has proven" in choose_capture("auto", cuda)[1]
    with pytest.raises(ValueError, match="must be 'auto', 'graph' or 'eager', got 'fast'"):
        choose_capture("fast", cpu)  # type: ignore[arg-type]


class Features:
    """Batches of an ``FptModel`` with features as a tier brings them: a ``store`` that is read by
    ``rows``, two ``slots`` in turn, or ``fresh`` memory each time."""

    def __init__(self, model: FptModel, way: str, dtype: torch.dtype = torch.float16) -> None:
        generator = torch.Generator().manual_seed(3)
        shape = (11, len(model.layers), 2, 3, 5, 16)
        self.kv = torch.randn(shape, generator=generator).to(dtype)
        self.pixels = torch.randn((11, 3, *model.config.side_size), generator=generator)
        self.labels = torch.arange(11) % CLASSES
        self.slots = [torch.empty_like(self.kv[:4]) for _ in range(2)]
        self.way, self.epoch, self.kept = way, 0, list[Tensor]()

    def __len__(self) -> int:
        return 3

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[FeatureBatch]:
        generator = torch.Generator().manual_seed(self.epoch)
        for turn, rows in enumerate(torch.randperm(11, generator=generator).split(4)):
            kv = self.kv
            if self.way == "slots":
                kv = self.slots[turn % 2][: len(rows)].copy_(self.kv[rows])
            elif self.way == "fresh":
                kv = self.kv[rows]
                self.kept.append(kv)
            yield FeatureBatch(
                self.pixels[rows].clone(),
                kv,
                rows.clone() if self.way == "store" else None,
                self.labels[rows],
                tuple(str(int(row)) for row in rows),
            )


# By way: a graph for each size of batch and each of two places; fresh features are read where they
# are twice, then copied to one place, which grows once.
GRAPHS = {"store": 2, "slots": 3, "fresh": 5}


@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
@pytest.mark.parametrize("way", GRAPHS)
def test_fpt_trains_the_same_captured(tmp_path: Path, method: str, way: str) -> None:
    def trained(name: str, step: Any) -> Any:
        model = create_model(
            method, backbone=TINY_SPEC, num_classes=CLASSES, side_size=(16, 24), side_reduction=4
        )
        batches, val = Features(model, way), Features(model, "store")
        return run(tmp_path / name, step, model, batches, val, epochs=4)

    capture = TapeCapture()
    assert_same_training(trained("ordinary", "eager"), trained("captured", capture), rtol=2e-4)
    assert len(capture.tapes) == GRAPHS[way] and capture.replays == 12
