"""TensorBoard files of a run, and the message where the package is not there."""

import math
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fpt_fast.records import EpochRecord, TrainingHistory
from fpt_fast.tracking import TensorBoardCallback


def test_epochs_become_scalars(tmp_path: Path) -> None:
    callback = TensorBoardCallback(tmp_path / "tensorboard")
    records = tuple(
        EpochRecord(e, 1.0 / (e + 1), 0.25, 1.0, {"auc": math.nan if e == 0 else 0.5, "f1": 0.75})
        for e in range(3)
    )
    for record in records:
        callback.on_epoch_end(record)
    callback.on_end(TrainingHistory(records, "auc", 1, 0.5))

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }
    assert points == {
        "train/loss": [(0, 1.0), (1, 0.5), (2, pytest.approx(1 / 3))],
        "train/learning_rate": [(0, 0.25), (1, 0.25), (2, 0.25)],
        "val/auc": [(1, 0.5), (2, 0.5)],
        "val/f1": [(0, 0.75), (1, 0.75), (2, 0.75)],
    }


def test_without_tensorboard_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install fpt-fast\[tensorboard\]"):
        TensorBoardCallback(tmp_path)
