"""Training that is stopped or killed within an epoch ends with the uninterrupted run's files."""

import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from children import STOPPED, exit_status
from small_run import files_of
from struck_training import train_struck

from fpt_fast.cli import main
from fpt_fast.config import ConfigError
from fpt_fast.pipeline import PreloadSettings, TrainSettings, preload, train
from fpt_fast.trainer import CheckpointError

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


def train_until(settings: TrainSettings, calls: int, number: int) -> int:
    """Train in a child that gets signal ``number`` within its ``calls``-th step; exit status."""
    return exit_status(train_struck, settings, calls, number)


def history_of(run: Path) -> list[dict[str, str]]:
    with (run / "history.csv").open(newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]


@pytest.mark.parametrize("changes", [{}, {"cache": "none"}], ids=["cached", "live"])
def test_stopped_killed_and_stopped_again(
    changes: dict[str, Any],
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    backbone: Path,
    tmp_path: Path,
) -> None:
    if changes:
        changes = {
            **changes,
            "backbone": str(backbone),
            "input_size": "48",
            "normalization": "backbone",
            "augment_input": True,
        }
    else:
        preload(preload_settings())
    changes |= {"epochs": 3, "checkpoint_steps": 2}
    whole = train(train_settings(run=tmp_path / "whole", **changes)).run
    # Three steps an epoch.  The kill falls after the checkpoint of step 4, two steps later.
    parts = tmp_path / "parts"
    assert train_until(train_settings(run=parts, **changes), 2, signal.SIGTERM) == STOPPED
    again = train_settings(run=parts, resume=True, **changes)
    assert train_until(again, 4, signal.SIGKILL) == -signal.SIGKILL
    assert train_until(again, 3, signal.SIGTERM) == STOPPED
    train(again)
    assert history_of(parts) == history_of(whole)
    assert files_of(parts / "best") == files_of(whole / "best")
    ours, theirs = files_of(parts / "last"), files_of(whole / "last")
    assert ours.keys() == theirs.keys()
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert ours[name] == theirs[name]
    assert (parts / "predictions.csv").read_bytes() == (whole / "predictions.csv").read_bytes()


def test_deterministic_reruns_are_bit_equal(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    first, second = (
        train(train_settings(run=tmp_path / name, deterministic=True)).run for name in "ab"
    )
    assert files_of(first / "best") == files_of(second / "best")
    assert history_of(first) == history_of(second)


@pytest.mark.parametrize("steps", ["20", "30:20", "a:b", "5:5", "-1:4"])
def test_steps_to_profile_are_a_range(steps: str, train_settings: MakeTrain) -> None:
    with pytest.raises(ConfigError, match="profile_steps must be a first and a last step"):
        train(train_settings(profile_steps=steps))


def without_target(path: Path) -> None:
    """Take the recipe's ``target`` out of a run's own settings, which earlier versions lacked."""
    state = json.loads(path.read_text())
    del state["identity"]["config"]["target"]
    path.write_text(json.dumps(state))


def test_a_run_of_an_earlier_version_is_resumed_to_the_same_bits(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    changes: dict[str, Any] = {"epochs": 2, "checkpoint_steps": 2}
    whole = train(train_settings(run=tmp_path / "whole", **changes)).run
    parts = tmp_path / "parts"
    assert train_until(train_settings(run=parts, **changes), 4, signal.SIGTERM) == STOPPED
    without_target(parts / "last" / "state.json")
    config = yaml.safe_load((parts / "config.yaml").read_text())
    del config["training"]["target"], config["settings"]["value_column"]
    (parts / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", "--config", str(parts / "config.yaml"), "--resume"]) == 0
    assert history_of(parts) == history_of(whole)
    for name in ("best/model.safetensors", "last/optimizer.safetensors", "predictions.csv"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()


def test_a_run_goes_on_from_any_folder(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    preload(preload_settings())
    changes: dict[str, Any] = {"epochs": 2, "checkpoint_steps": 2}
    whole = train(train_settings(run=tmp_path / "whole", **changes)).run
    monkeypatch.chdir(tmp_path)
    assert train_until(train_settings(run=Path("run"), **changes), 4, signal.SIGTERM) == STOPPED
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    resume = ["train", "--config", "../run/config.yaml", "--resume"]
    assert main(resume) == 0
    assert history_of(tmp_path / "run") == history_of(whole) and not list(elsewhere.iterdir())
    # Moved, it must be named; what was looked at is told in whole.
    (tmp_path / "run").rename(tmp_path / "moved")
    resume[2] = "../moved/config.yaml"
    assert main(resume) == 1
    said = capsys.readouterr().err
    assert f"nothing to resume: {tmp_path / 'run'} has no checkpoint" in said and "--run" in said
    assert main([*resume, "--run", "../moved"]) == 0


def test_a_run_of_numbers_is_not_resumed_as_what_it_was_not(
    preload_settings: MakePreload, train_settings: MakeTrain, data: Path, tmp_path: Path
) -> None:
    lines = ["path,split,age"]
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        key = path.relative_to(data)
        lines.append(f"{key.as_posix()},{key.parts[0]},{40 + number}")
    (data / "list.csv").write_text("\n".join(lines))
    preload(preload_settings())
    settings = train_settings(data=data / "list.csv", value_column="age")
    run = train(settings).run
    without_target(run / "last" / "state.json")
    with pytest.raises(CheckpointError, match=r"resumed: config.target: None -> \[\d+\.\d+, \d"):
        train(train_settings(data=data / "list.csv", value_column="age", resume=True))
