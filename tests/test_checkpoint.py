"""Checkpoints: resumed equals uninterrupted, and a kill at any instant leaves a valid one."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from toy_training import (
    CLASSES,
    Interrupted,
    Recorder,
    StopAfter,
    ToyBatches,
    ToyModel,
    assert_equal_weights,
    files_below,
    toy_config,
    toy_model,
    weights_of,
    without_seconds,
)

from fpt_fast.config import TrainConfig
from fpt_fast.interrupts import Stopped
from fpt_fast.records import FeatureBatch, TrainingHistory
from fpt_fast.trainer import CheckpointError, fit, load_weights
from fpt_fast.trainer.checkpoint import Checkpoint, load_last, save_best, save_last


def train(
    model: torch.nn.Module, run_dir: Path, config: TrainConfig, **changes: Any
) -> TrainingHistory:
    settings = {"num_classes": CLASSES, "class_counts": [5, 6, 7], "progress": False, **changes}
    return fit(model, ToyBatches(), ToyBatches(2, 9, seed=1), config, run_dir=run_dir, **settings)


def version(number: int) -> Checkpoint:
    """A checkpoint of which every part says which one it is."""
    tensor = torch.full((50,), float(number))
    return Checkpoint({"weight": tensor}, {"0.exp_avg": tensor.clone()}, {"number": number})


def number_of(checkpoint: Checkpoint | None) -> int:
    """Which ``version`` it is; all parts must agree."""
    assert checkpoint is not None
    number: int = checkpoint.state["number"]
    assert set(checkpoint.model["weight"].tolist()) == {float(number)}
    assert set(checkpoint.optimizer["0.exp_avg"].tolist()) == {float(number)}
    return number


class CountedModel(torch.nn.Module):
    """One weight that says which version it is."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((50,), float(number)))


@pytest.mark.parametrize("stop", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adam", "loss": "focal"},
        {"optimizer": "sgd", "loss_weight": "dynamic", "warmup_epochs": 1},
    ],
    ids=["adamw", "adam", "sgd"],
)
def test_resumed_equals_uninterrupted(tmp_path: Path, changes: dict[str, Any], stop: int) -> None:
    config = toy_config(epochs=4, **changes)
    whole = toy_model()
    recorder = Recorder(whole)
    expected = train(whole, tmp_path / "whole", config, callbacks=[recorder])

    with pytest.raises(Interrupted):
        train(toy_model(), tmp_path / "parts", config, callbacks=[StopAfter(stop)])
    torch.manual_seed(999)
    resumed = ToyModel()
    rest = Recorder(resumed)
    history = train(resumed, tmp_path / "parts", config, resume=True, callbacks=[rest])

    assert without_seconds(history) == without_seconds(expected)
    assert [record.epoch for record in rest.records] == list(range(stop + 1, 4))
    assert_equal_weights(weights_of(resumed), weights_of(whole))
    names = files_below(tmp_path / "whole")
    assert names == files_below(tmp_path / "parts") == [
        "best/model.safetensors",
        "last/model.safetensors",
        "last/optimizer.safetensors",
        "last/state.json",
    ]  # fmt: skip
    for name in names[:3]:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_cleanly_within_an_epoch(tmp_path: Path, number: signal.Signals) -> None:
    class Signalling(ToyBatches):
        def __iter__(self) -> Iterator[FeatureBatch]:
            for step, batch in enumerate(super().__iter__()):
                if (self.epoch, step) == (1, 2):
                    signal.raise_signal(number)
                yield batch

    def run(folder: str, batches: ToyBatches, **changes: Any) -> dict[str, torch.Tensor]:
        model = toy_model()
        fit(model, batches, None, toy_config(), run_dir=tmp_path / folder, **changes)
        return weights_of(model)

    with pytest.raises(Stopped, match=rf"{number.name}; 1 of 3 epochs .*last; resume"):
        run("parts", Signalling(), num_classes=CLASSES)
    resumed = run("parts", ToyBatches(), num_classes=CLASSES, resume=True)
    assert_equal_weights(resumed, run("whole", ToyBatches(), num_classes=CLASSES))


def test_resuming_a_finished_run_gives_its_history(tmp_path: Path) -> None:
    first = train(toy_model(), tmp_path, toy_config(monitor="f1"))
    model = ToyModel()
    recorder = Recorder(model)
    again = train(model, tmp_path, toy_config(monitor="f1"), resume=True, callbacks=[recorder])
    assert again == first
    assert recorder.records == []
    assert recorder.history == first


def test_resume_without_a_run_starts_one(tmp_path: Path) -> None:
    assert len(train(toy_model(), tmp_path, toy_config(), resume=True).epochs) == 3


def test_metrics_that_are_no_numbers_survive_a_resume(tmp_path: Path) -> None:
    def run(folder: str, **changes: Any) -> TrainingHistory:
        return fit(
            toy_model(),
            ToyBatches(),
            ToyBatches(1, 4, labels=(1,)),
            toy_config(),
            run_dir=tmp_path / folder,
            num_classes=CLASSES,
            **changes,
        )

    expected = run("whole")
    with pytest.raises(Interrupted):
        run("parts", callbacks=[StopAfter(1)])
    history = run("parts", resume=True)
    assert without_seconds(history) == without_seconds(expected)
    assert (tmp_path / "parts/best/model.safetensors").exists()


def test_an_earlier_run_is_never_overwritten(tmp_path: Path) -> None:
    train(toy_model(), tmp_path, toy_config())
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    with pytest.raises(CheckpointError, match="holds a run already; pass resume=True"):
        train(toy_model(), tmp_path, toy_config())
    assert before == {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}


def test_resume_with_other_settings_names_them(tmp_path: Path) -> None:
    train(toy_model(), tmp_path, toy_config())
    with pytest.raises(
        CheckpointError,
        match=r"class_counts: \[5, 6, 7\] -> \[5, 6, 8\], config.learning_rate: 0.01 -> 0.5",
    ):
        train(
            toy_model(),
            tmp_path,
            toy_config(learning_rate=0.5),
            resume=True,
            class_counts=[5, 6, 8],
        )


def test_resume_with_another_model_is_refused(tmp_path: Path) -> None:
    train(toy_model(), tmp_path, toy_config())
    other = ToyModel()
    other.hidden = torch.nn.Linear(12, 9)
    with pytest.raises(CheckpointError, match="do not fit this model"):
        train(other, tmp_path, toy_config(), resume=True)
    with pytest.raises(CheckpointError, match="do not fit this model"):
        load_weights(ToyModel(5), tmp_path / "best")
    with pytest.raises(CheckpointError, match="cannot read weights from .*nowhere"):
        load_weights(ToyModel(), tmp_path / "nowhere")


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    train(toy_model(), tmp_path, toy_config())
    for name in files_below(tmp_path):
        path = tmp_path / name
        if path.suffix == ".safetensors":
            assert load_file(path)
        else:
            state = json.loads(
                path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} is not JSON")
            )
            assert state["identity"]["config"]["epochs"] == 3


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("state.json", lambda path: path.write_text("{"), "cannot read the checkpoint"),
        ("state.json", lambda path: path.write_text('{"format": 99}'), "format 2, got 99"),
        ("state.json", lambda path: path.unlink(), "cannot read the checkpoint"),
        ("model.safetensors", lambda path: os.truncate(path, 40), "cannot read the checkpoint"),
        ("optimizer.safetensors", lambda path: path.unlink(), "cannot read the checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_an_error(
    tmp_path: Path, name: str, damage: Callable[[Path], object], match: str
) -> None:
    save_last(tmp_path, version(1))
    damage(tmp_path / "last" / name)
    with pytest.raises(CheckpointError, match=match):
        load_last(tmp_path)


_STEPS = ((os, "fsync"), (Path, "rename"), (Path, "replace"), (Path, "mkdir"), (Path, "open"),
          (shutil, "rmtree"), (Path, "rmdir"))  # fmt: skip


class Kill(BaseException):
    """Not an ``Exception``, as nothing may handle a kill."""


def break_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """From now on, the file operation after ``steps`` others and all later ones fail."""
    left = steps

    def wrap(original: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left < 0:
                raise Kill
            return original(*args, **kwargs)

        return step

    for owner, name in _STEPS:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))


def test_a_stop_at_every_file_operation_keeps_last(tmp_path: Path) -> None:
    outcomes: list[int] = []
    for steps in range(100):
        run_dir = tmp_path / str(steps)
        save_last(run_dir, version(1))
        with pytest.MonkeyPatch.context() as monkeypatch:
            break_after(monkeypatch, steps)
            try:
                save_last(run_dir, version(2))
                finished = True
            except Kill:
                finished = False
        outcomes.append(number_of(load_last(run_dir)))
        save_last(run_dir, version(3))
        assert number_of(load_last(run_dir)) == 3
        assert sorted(p.name for p in run_dir.iterdir()) == ["last"]
        if finished:
            break
    assert outcomes[0] == 1
    assert outcomes[-1] == 2
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 8


def test_a_stop_at_every_file_operation_keeps_best(tmp_path: Path) -> None:
    outcomes: list[float] = []
    for steps in range(100):
        run_dir = tmp_path / str(steps)
        save_best(run_dir, CountedModel(1), None)
        with pytest.MonkeyPatch.context() as monkeypatch:
            break_after(monkeypatch, steps)
            try:
                save_best(run_dir, CountedModel(2), None)
                finished = True
            except Kill:
                finished = False
        model = CountedModel()
        load_weights(model, run_dir / "best")
        outcomes.append(float(model.weight.detach()[0]))
        if finished:
            break
    assert outcomes[0] == 1.0
    assert outcomes[-1] == 2.0
    assert outcomes == sorted(outcomes)


def _save_for_ever(run_dir: Path) -> None:
    for number in range(1, 1_000_000):
        save_last(run_dir, version(number))
        save_best(run_dir, CountedModel(number), None)


def test_sigkill_at_any_time_leaves_a_valid_checkpoint(tmp_path: Path) -> None:
    save_last(tmp_path, version(0))
    save_best(tmp_path, CountedModel(0), None)
    # Forked, so that a kill costs no start of an interpreter.
    context = multiprocessing.get_context("fork")
    numbers = []
    for attempt in range(12):
        process = context.Process(target=_save_for_ever, args=(tmp_path,))
        process.start()
        time.sleep(0.02 + 0.0137 * attempt)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        numbers.append(number_of(load_last(tmp_path)))
        load_weights(CountedModel(), tmp_path / "best")
    assert max(numbers) > 0


def test_a_full_disk_keeps_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_last(tmp_path, version(1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_last(tmp_path, version(2))
    monkeypatch.undo()
    assert number_of(load_last(tmp_path)) == 1


def test_best_uses_the_models_own_save(tmp_path: Path) -> None:
    class SavingModel(ToyModel):
        def save_pretrained(self, directory: Path, extra: dict[str, Any] | None = None) -> None:
            (directory / "config.json").write_text(json.dumps(extra))
            (directory / "model.safetensors").write_bytes(b"weights of my own")

    torch.manual_seed(7)
    train(SavingModel(), tmp_path, toy_config(monitor="f1"), extra={"classes": ["a", "b", "c"]})
    assert json.loads((tmp_path / "best/config.json").read_text()) == {"classes": ["a", "b", "c"]}
    assert (tmp_path / "best/model.safetensors").read_bytes() == b"weights of my own"
