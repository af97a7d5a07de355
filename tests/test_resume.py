"""A run interrupted at any step and resumed gives the uninterrupted run's weights, bit for bit."""

import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from children import STOPPED, exit_status
from toy_training import (
    CLASSES,
    ToyBatches,
    assert_equal_weights,
    files_below,
    toy_config,
    toy_model,
    without_seconds,
)
from watched_run import EPOCHS, STEPS, VAL_STEPS, At, run, run_struck

from fpt_fast.config import ConfigError
from fpt_fast.interrupts import Stopped
from fpt_fast.records import FeatureBatch
from fpt_fast.trainer import TrainingError, deterministic_algorithms, fit
from fpt_fast.trainer.checkpoint import load_last


def assert_same_run(whole: Path, parts: Path) -> None:
    """The same files with the same bytes; of the state all but the wall time."""
    assert files_below(whole) == files_below(parts)
    for name in files_below(whole):
        left, right = ((folder / name).read_bytes() for folder in (whole, parts))
        if name.endswith("state.json"):
            states = [json.loads(content) for content in (left, right)]
            for state in states:
                for record in state["records"]:
                    del record["seconds"]
            assert states[0] == states[1]
        else:
            assert left == right, name


@pytest.mark.parametrize("checkpoint_steps", [0, 1, 3])
def test_killed_and_stopped_at_ten_random_steps(tmp_path: Path, checkpoint_steps: int) -> None:
    run(tmp_path / "whole")
    rng = random.Random(checkpoint_steps)
    chosen = sorted(rng.sample(range(1, EPOCHS * STEPS), 10))
    for i, at in enumerate(chosen):
        number = (signal.SIGKILL, signal.SIGTERM)[i % 2]

        status = exit_status(run_struck, tmp_path / "parts", checkpoint_steps, at, number)
        assert status == (-signal.SIGKILL if number == signal.SIGKILL else STOPPED)
    assert exit_status(run_struck, tmp_path / "parts", checkpoint_steps) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("at", [(0, 0), (0, STEPS - 1), (2, 3)], ids=str)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_a_signal_loses_no_step(tmp_path: Path, number: signal.Signals, at: At) -> None:
    expected, weights = run(tmp_path / "whole")
    steps: list[At] = []

    def strike(epoch: int, step: int) -> None:
        steps.append((epoch, step))
        if (epoch, step) == at:
            signal.raise_signal(number)

    told = rf"{number.name}; {at[0]} of 4 epochs and {at[1] + 1} of 7 steps .* resume"
    with pytest.raises(Stopped, match=told):
        run(tmp_path / "parts", strike)
    history, resumed = run(tmp_path / "parts", lambda *now: steps.append(now))
    assert steps == [(epoch, step) for epoch in range(EPOCHS) for step in range(STEPS)]
    assert without_seconds(history) == without_seconds(expected)
    assert_equal_weights(resumed, weights)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_during_validation_keeps_the_epoch(tmp_path: Path) -> None:
    _, weights = run(tmp_path / "whole")
    seen: list[At] = []

    def strike(epoch: int, step: int) -> None:
        if len(seen) == VAL_STEPS + 1:  # the second batch of the second validation
            signal.raise_signal(signal.SIGTERM)
        seen.append((epoch, step))

    with pytest.raises(Stopped, match="1 of 4 epochs and 7 of 7 steps"):
        run(tmp_path / "parts", before_val=strike)
    assert len(seen) == VAL_STEPS + 2
    steps: list[At] = []
    _, resumed = run(tmp_path / "parts", lambda *now: steps.append(now))
    assert steps[0] == (2, 0)
    assert_equal_weights(resumed, weights)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_every_so_many_steps(tmp_path: Path) -> None:
    """Checkpoints count the steps of the whole run: steps 5, 10, 15, ... from 1."""

    class Kill(BaseException):
        pass

    def kill(epoch: int, step: int) -> None:
        if (epoch, step) == (1, 5):
            raise Kill

    with pytest.raises(Kill):
        run(tmp_path, kill, checkpoint_steps=5)
    checkpoint = load_last(tmp_path)
    assert checkpoint is not None
    begun = checkpoint.state["begun"]
    assert begun["epoch"] == 1 and len(begun["losses"]) == 3 and begun["sizes"] == [5, 5, 5]
    with pytest.raises(ConfigError, match="checkpoint_steps must be at least 0, got -1"):
        run(tmp_path / "other", checkpoint_steps=-1)


def test_no_checkpoint_holds_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    class Broken(ToyBatches):
        def __iter__(self) -> Iterator[FeatureBatch]:
            for step, batch in enumerate(super().__iter__()):
                if step == 2:
                    batch.side_pixels.fill_(torch.nan)
                yield batch

    with pytest.raises(TrainingError, match="epoch 0, step 2"):
        fit(
            toy_model(),
            Broken(STEPS),
            None,
            toy_config(),
            run_dir=tmp_path,
            num_classes=CLASSES,
            progress=False,
            checkpoint_steps=1,
        )
    checkpoint = load_last(tmp_path)
    assert checkpoint is not None and len(checkpoint.state["begun"]["losses"]) == 2


def test_deterministic_algorithms_are_asked_for_and_put_back() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(ZeroDivisionError), deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        1 / 0  # noqa: B018
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_bit_equal_reruns(tmp_path: Path) -> None:
    with deterministic_algorithms(True):
        run(tmp_path / "first")
    run(tmp_path / "second")
    assert_same_run(tmp_path / "first", tmp_path / "second")
