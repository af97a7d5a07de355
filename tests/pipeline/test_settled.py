"""What a cache has settled: whatever a run says of it must be so, and its files say what it is."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fpt_fast.cache import CacheMismatch
from fpt_fast.cli import main
from fpt_fast.config import ConfigError
from fpt_fast.images import dataset_preset
from fpt_fast.pipeline import (
    DoctorSettings,
    EvaluateSettings,
    PreloadSettings,
    SweepSettings,
    TrainSettings,
    evaluate,
    preload,
    train,
)
from fpt_fast.setting_values import build_settings, read_yaml

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]
PUBLISHED = dataset_preset("ddr")


@pytest.mark.parametrize(
    ("made", "asked", "difference"),
    [
        # Each of these is what would be taken for granted elsewhere.
        ({"fit": "pad"}, {"fit": "stretch"}, "fit: the cache has pad, this run asks for stretch"),
        ({"window": "full"}, {"window": "file"}, "window: the cache has full, .* for file"),
        ({"token_ratio": 0.3}, {"token_ratio": 0.2}, "token_ratio: the cache has 0.3, .* for 0.2"),
        ({"features": "int8"}, {"features": "float16"}, "features: the cache has int8, .* float16"),
        (
            {"position_interpolation": "bicubic_scale"},
            {"position_interpolation": "timm"},
            "position_interpolation: the cache has bicubic_scale, .* for timm",
        ),
        (
            {"normalization": "backbone"},
            {"normalization": "auto"},
            "normalization: the cache has backbone, this run asks for auto",
        ),
        # And these are not.
        (
            {"normalization": "ddr"},
            {"normalization": "auto"},
            "normalization: the cache has ddr, this run asks for auto",
        ),
        (
            {"normalization": "auto"},
            {"normalization": "ddr"},
            "mean: the cache has .*, this run asks for "
            + " ".join(f"{channel:.4f}" for channel in PUBLISHED.mean),
        ),
        ({}, {"mean": (0.4, 0.4, 0.4)}, "mean: the cache has 0.5000 .*, this run asks for 0.4000"),
        ({}, {"dtype": "bfloat16"}, "dtype: the cache has float32, this run asks for bfloat16"),
        ({}, {"dicom_frame": 1}, "dicom_frame: the cache has none, this run asks for 1"),
        ({}, {"checkpoint_path": Path("w.bin")}, "checkpoint_path: the cache has none, .*w.bin"),
        ({}, {"pretrained": False}, "pretrained: the cache has True, this run asks for False"),
        ({}, {"input_size": "72x48"}, "input_size: the cache has 48x48, .* for 72x48"),
    ],
    ids=str,
)
def test_what_a_run_says_must_be_what_the_cache_has(
    made: dict[str, Any],
    asked: dict[str, Any],
    difference: str,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
) -> None:
    preload(preload_settings(**made))
    with pytest.raises(CacheMismatch, match=rf"other settings:\n  {difference}"):
        train(train_settings(**asked))
    assert not (tmp_path / "run").exists()


def test_what_a_run_says_again_is_no_difference_and_its_files_have_all(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    backbone: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preload(preload_settings(fit="pad", window="full", input_size="72x48", normalization="auto"))
    again = {
        **{"fit": "pad", "window": "full", "input_size": "72x48", "normalization": "auto"},
        **{"dtype": "float32", "backbone": str(backbone), "layers": "2-3", "token_ratio": 0.2},
        **{"importance": "global", "features": "float16", "position_interpolation": "timm"},
    }
    silent = train(train_settings(epochs=1))
    said = train(train_settings(epochs=1, run=silent.run.with_name("said"), **again))
    assert said.metrics.values == silent.metrics.values
    for result in (silent, said):
        config = yaml.safe_load((result.run / "config.yaml").read_text())
        settings = result.report.read_text().split("<h2>Settings</h2>")[1]
        table = dict(re.findall(r'<tr><th scope="row">(.*?)</th><td>(.*?)</td></tr>', settings))
        for name, value in again.items():
            if name != "normalization" or result is said:
                assert table[name] == str(value), name
                if name != "layers" or result is said:
                    assert config["settings"][name] == value, name
        for name in ("mean", "std"):
            assert config["settings"][name] == config["features"][name]
            assert table[name] == ", ".join(map(str, config["features"][name]))
    # The run goes on by its own settings, wherever the frozen model is now.
    backbone.rename(backbone.with_name("moved"))
    config_file = silent.run / "config.yaml"
    assert main(["train", "--config", str(config_file), "--resume"]) == 0
    assert main(["evaluate", "--run", str(silent.run)]) == 0


def test_a_run_of_an_earlier_version_wrote_defaults_that_its_cache_had_not(
    preload_settings: MakePreload, train_settings: MakeTrain
) -> None:
    preload(preload_settings(fit="pad", window="full"))
    first = train(train_settings(epochs=1))
    file = first.run / "config.yaml"
    config = yaml.safe_load(file.read_text())
    config["settings"] |= {
        **{"fit": "stretch", "window": "file", "normalization": "auto", "dtype": "auto"},
        **{"mean": None, "std": None, "backbone": None, "input_size": None},
    }
    file.write_text(yaml.safe_dump(config))
    settings = build_settings(TrainSettings, read_yaml(file, TrainSettings))
    assert (settings.fit, settings.window, settings.normalization) == ("pad", "full", None)
    assert main(["train", "--config", str(file), "--resume"]) == 0
    assert evaluate(run=first.run).metrics.values == first.metrics.values


def test_a_runs_own_file_is_for_the_command_that_wrote_it(
    preload_settings: MakePreload, train_settings: MakeTrain
) -> None:
    preload(preload_settings())
    file = train(train_settings(epochs=1)).run / "config.yaml"
    assert read_yaml(file, TrainSettings)["epochs"] == 1
    wrote = "config.yaml of a run, which fpt-fast train wrote and takes; "
    for settings, instead in (
        (PreloadSettings, "here a file may hold attention, backbone, "),
        (SweepSettings, "here a file may hold "),
        (EvaluateSettings, f"here --run {file.parent} says it all: leave --config out"),
        (DoctorSettings, f"here --run {file.parent} says it all: leave --config out"),
    ):
        with pytest.raises(ConfigError, match=wrote + instead):
            read_yaml(file, settings)
    file.write_text("settings: {data: d, cache: c, run: r, epochz: 3}")
    with pytest.raises(ConfigError, match="unknown key 'epochz'"):
        read_yaml(file, TrainSettings)
    file.write_text("settings: {data: d, cache: c, run: r, halve_every: 3}")
    with pytest.raises(ConfigError, match="fpt-fast sweep wrote and takes"):
        read_yaml(file, TrainSettings)


def test_a_side_input_larger_than_the_frozen_models_is_warned_of(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    caplog: pytest.LogCaptureFixture,
) -> None:
    preload(preload_settings())
    train(train_settings(epochs=1, side_size="48"))
    assert "larger than the frozen" not in caplog.text
    train(train_settings(epochs=1, side_size="24x56", overwrite=True))
    [said] = [r for r in caplog.records if "larger than the frozen" in r.message]
    assert said.levelname == "WARNING" and "input of 24x56" in said.message
    assert "of 48x48" in said.message and "--side-size" in said.message
