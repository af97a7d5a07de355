"""The command line: typed, from flags and YAML, with errors that name what was wrong."""

import json
from pathlib import Path

import pytest
import yaml
from small_run import write_backbone

from fpt_fast.cli import main
from fpt_fast.config import ConfigError
from fpt_fast.setting_values import build_settings, parse_size, read_yaml, to_yaml_values
from fpt_fast.settings import PreloadSettings, TrainSettings
from helpers import write_image_set


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_backbone(tmp_path / "vit")
    write_image_set(tmp_path / "images")
    return tmp_path


def preload_words(folder: Path) -> list[object]:
    return [
        *("preload", "--data", folder / "images", "--backbone", folder / "vit"),
        *("--cache", folder / "cache", "--input-size", 48, "--normalization", "backbone"),
    ]


def test_the_commands_of_the_readme(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*preload_words(folder)) == 0
    assert "preloaded 24 of 24 images" in capsys.readouterr().out
    train = [
        *("train", "--data", folder / "images", "--cache", folder / "cache"),
        *("--run", folder / "run", "--side-size", 24, "--epochs", 1),
    ]
    assert run(*train) == 0
    assert "auc" in capsys.readouterr().out
    assert run(*train) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert run("evaluate", "--run", folder / "run", "--split", "val") == 0
    assert capsys.readouterr().out.startswith("val: ")
    other = [*train[:-4], "--seed", 1, "--side-size", 24, "--epochs", 1]
    other[other.index(folder / "run")] = folder / "other"
    assert run(*other) == 0
    capsys.readouterr()
    out = folder / "comparison.json"
    assert run("compare", folder / "run", folder / "other", "--output", out) == 0
    said = capsys.readouterr().out
    assert said.startswith("6 images; differences are first less second, with 95% intervals\nAUC: ")
    assert "AUC of healthy: " in said and "(DeLong)" in said and "(paired bootstrap)" in said
    assert set(json.loads(out.read_text())["delong_per_class"]) == {"healthy", "mild", "severe"}
    assert run("compare", folder / "run", folder / "other", "--split", "val") == 1
    assert "evaluate --run" in capsys.readouterr().err
    images = sorted((folder / "images" / "test").rglob("*.png"))[:2]
    out = folder / "out.csv"
    assert run("predict", "--run", folder / "run", "--images", *images, "--output", out) == 0
    assert len(out.read_text().splitlines()) == 3
    assert run("cache", "inspect", folder / "cache") == 0
    assert "24" in capsys.readouterr().out
    assert run("cache", "verify", folder / "cache") == 0
    assert run("cache", "convert", folder / "cache", folder / "int8") == 0
    assert "converted 24 of 24 records" in capsys.readouterr().out
    assert run("cache", "convert", folder / "int8", folder / "x", "--dtype", "int8") == 1
    assert "cannot be undone" in capsys.readouterr().err
    repair = ("cache", "repair", "--cache", folder / "cache", "--data", folder / "images")
    assert run(*repair, "--backbone", folder / "vit") == 0
    assert "rebuilt 0 records" in capsys.readouterr().out


def test_a_damaged_cache_gives_status_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(*preload_words(folder))
    shard = max((folder / "cache").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 1
    shard.write_bytes(content)
    capsys.readouterr()
    assert run("cache", "verify", folder / "cache") == 1
    assert "repair" in capsys.readouterr().out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    out = capsys.readouterr().out
    assert "torch: " in out and "xformers: " in out
    for line in (
        "frozen_attention: impl='auto' runs 'native'",
        "token_scores: impl='auto' runs 'native'",
    ):
        assert line in out
    for name in ("flash", "efficient", "cudnn", "xformers"):
        assert f"  {name}: " in out
    assert "it runs on cuda tensors, got tensors on cpu" in out


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--data", "x", "--cache", "c", "--run", "r", "--epoch-count", "3"],
        ["train", "--data", "x", "--cache", "c"],
        ["train", "--data", "x", "--cache", "c", "--run", "r", "--epochs", "many"],
        ["train", "--data", "x", "--cache", "c", "--run", "r", "--method", "fpt_minus"],
        ["prelaod"],
        [],
    ],
    ids=" ".join,
)
def test_words_that_mean_nothing_exit_with_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2


def test_help_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0
    assert "--token-ratio" in capsys.readouterr().out


def test_yaml_under_flags(folder: Path) -> None:
    config = folder / "preload.yaml"
    config.write_text(
        f"data: {folder / 'images'}\nbackbone: {folder / 'vit'}\ninput-size: 56\n"
        "normalization: backbone\nmean: null\nworkers: 1\n"
    )
    cache = folder / "cache"
    assert run("preload", "--config", config, "--cache", cache, "--input-size", 48) == 0
    from fpt_fast.cache import inspect_cache

    assert inspect_cache(cache).fingerprint["input_size"] == [48, 48]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epochz: 3", "epochz"),
        ("epochs: many", "number"),
        ("method: fpt_minus", "fpt_plus"),
        ("fusion: maybe", "true or false"),
        ("[1, 2]", "keys and values"),
        ("epochs: [", "not valid YAML"),
    ],
)
def test_yaml_errors_name_the_key(
    text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "train.yaml"
    config.write_text(text)
    assert run("train", "--config", config, "--data", "x", "--cache", "c", "--run", "r") == 1
    assert named in capsys.readouterr().err


def test_settings_survive_yaml(tmp_path: Path) -> None:
    settings = TrainSettings(
        data=Path("images"),
        cache="none",
        run=Path("run"),
        loss_weight="given",
        loss_weights=(1.0, 2.5),
        learning_rate=1e-5,
        mean=(0.1, 0.2, 0.3),
        std=(1.0, 1.0, 1.0),
    )
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(to_yaml_values(settings)))
    assert build_settings(TrainSettings, read_yaml(path, TrainSettings)) == settings
    path.write_text("learning_rate: 1e-4\ndata: d\ncache: c\nrun: r")
    assert build_settings(TrainSettings, read_yaml(path, TrainSettings)).learning_rate == 1e-4


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="backbone, cache"):
        build_settings(PreloadSettings, {"data": Path("x")})


@pytest.mark.parametrize(
    ("text", "size"), [("512", (512, 512)), (64, (64, 64)), ("768x512", (768, 512))]
)
def test_sizes(text: str | int, size: tuple[int, int]) -> None:
    assert parse_size("input_size", text) == size


@pytest.mark.parametrize("text", ["", "0", "-5", "5x", "3x4x5", "5.5", "x"])
def test_sizes_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match="HEIGHTxWIDTH"):
        parse_size("input_size", text)
