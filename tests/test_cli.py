"""The command line: typed, from flags and YAML, with errors that name what was wrong."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from small_run import write_backbone

from fpt_fast.cli import main
from fpt_fast.config import ConfigError
from fpt_fast.run_settings import TrainSettings
from fpt_fast.setting_values import build_settings, parse_size, read_yaml, to_yaml_values
from fpt_fast.settings import PreloadSettings
from fpt_fast.words import counted, counted_are
from helpers import ROOT, write_image_set


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
    for extra in ("pydicom", "onnx", "onnxruntime", "peft", "huggingface-hub"):
        assert f"\n{extra}: " in out
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


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--version") == 0
    assert capsys.readouterr().out == f"fpt-fast {version('fpt-fast')}\n"


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
        ("epochz: 3", "unknown key 'epochz'; did you mean 'epochs' instead of 'epochz'?; known"),
        ("label_columns: opacity, lines", "must be a list like [opacity, lines], got the text 'op"),
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


def test_a_text_is_no_list_of_letters() -> None:
    """Of keywords, as of YAML."""
    values = {"data": "images", "cache": "none", "run": "run", "class_order": "mild"}
    with pytest.raises(ConfigError, match=r"class_order must be a list like \[mild\], got"):
        build_settings(TrainSettings, values)
    with pytest.raises(ConfigError, match=r"no 'class_ordr'; did you mean 'class_order' instead"):
        build_settings(TrainSettings, {**values, "class_ordr": ("mild",)})


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


NO_TORCH = """
import sys
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: (
    sys.exit("torch is imported") if name == "torch" else find_spec(name, *rest)
)
from fpt_fast.cli import main
raise SystemExit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("preload --data nowhere --backbone vit --cache c", "no such file or directory: nowhere; "),
        ("preload --data . --backbone vit --cache c --input-size big", "input_size must be a size"),
        (
            "train --data . --cache c --run r",
            "no feature cache at c; make it with fpt-fast preload",
        ),
        ("train --data . --cache none --run r --checkpoint-path w.bin", "names a file of weights"),
        ("evaluate --run nowhere", "nowhere holds no trained model: there is no such folder"),
        ("predict --run . --images a.png --output o.csv", "no such file or directory: a.png; "),
        ("train --config nowhere.yaml", "cannot read the configuration nowhere.yaml"),
    ],
)
def test_what_needs_no_work_is_refused_without_torch(words: str, said: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and said in done.stderr, done.stderr


def test_small_numbers_are_said_as_people_say_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*preload_words(folder)) == 0
    said = capsys.readouterr().out
    assert "preloaded 24 of 24 images into" in said and " kB, " in said
    assert (counted(1, "image"), counted(2, "image")) == ("1 image", "2 images")
    assert (counted_are(1, "image"), counted_are(0, "image")) == ("1 image is", "0 images are")


def test_other_libraries_are_heard_when_they_warn() -> None:
    code = """
import logging
from fpt_fast.cli import main
assert main(["doctor"]) == 1
for name in ("fpt_fast", "onnxscript.optimizer"):
    logging.getLogger(name).info("%s tells", name)
    logging.getLogger(name).warning("%s warns", name)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for heard in ("fpt_fast tells", "fpt_fast warns", "onnxscript.optimizer warns"):
        assert heard in done.stderr
    assert "onnxscript.optimizer tells" not in done.stderr
