"""The whole method on 8-bit features: preloaded or converted, trained on, evaluated, predicted."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import files_of

from fpt_fast.cache import CacheCorrupt, CacheMismatch, CacheReader, verify_cache
from fpt_fast.config import ConfigError
from fpt_fast.interrupts import Stopped
from fpt_fast.model import FptModel
from fpt_fast.ops import quantise_kv
from fpt_fast.pipeline import (
    PreloadSettings,
    TrainSettings,
    convert,
    converting,
    evaluate,
    predict,
    preload,
    repair,
    train,
)
from fpt_fast.trainer import CheckpointError
from helpers import class_image, write_image, write_image_set

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]
EIGHT_BIT = ("int8", "float8_e4m3fn")


@pytest.mark.parametrize("features", EIGHT_BIT)
def test_converted_equals_preloaded(
    preload_settings: MakePreload, tmp_path: Path, features: str
) -> None:
    f16, direct = tmp_path / "f16", tmp_path / "direct"
    preload(preload_settings(cache=f16))
    before = files_of(f16)
    preload(preload_settings(cache=direct, features=features))
    done = convert(source=f16, target=tmp_path / "converted", dtype=features)
    assert (done.images, done.converted) == (24, 24)
    assert 0 < done.bytes_after <= done.bytes_before
    assert files_of(tmp_path / "converted") == files_of(direct)
    assert files_of(f16) == before
    assert convert(source=f16, target=tmp_path / "converted", dtype=features).converted == 0
    with CacheReader(f16) as source, CacheReader(direct) as target:
        half, stored = source.read(range(24)), target.read(range(24))
        kv, k_scales, v_scales = quantise_kv(half.kv, getattr(torch, features))
        assert torch.equal(stored.kv.view(torch.uint8), kv.view(torch.uint8))
        assert stored.k_scales is not None and torch.equal(stored.k_scales, k_scales)
        assert stored.v_scales is not None and torch.equal(stored.v_scales, v_scales)
        assert torch.equal(stored.index, half.index)
        assert target.fingerprint == {**source.fingerprint, "features": features}
        assert target.notes == source.notes


@pytest.mark.usefixtures("whole_figures")
@pytest.mark.parametrize("features", EIGHT_BIT)
def test_the_four_calls(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    backbone: Path,
    data: Path,
    tmp_path: Path,
    features: str,
) -> None:
    preload(preload_settings(features=features))
    result = train(train_settings(features=features))
    again = evaluate(run=result.run, split="test")
    assert again.values["auc"] == pytest.approx(result.metrics.values["auc"], abs=1e-9)
    assert (result.run / "report.html").exists()
    live = evaluate(run=result.run, split="test", cache="none", backbone=str(backbone))
    assert live.values["auc"] == pytest.approx(result.metrics.values["auc"], abs=1e-9)
    # New images go through the same quantisation: probabilities agree far below its error.
    predict(run=result.run, images=(data / "test",), output=tmp_path / "out.csv", dtype="float32")
    with (result.run / "predictions.csv").open() as file:
        trained = {row["key"]: row for row in csv.DictReader(file)}
    with (tmp_path / "out.csv").open() as file:
        for row in csv.DictReader(file):
            theirs = trained[Path(row["path"]).relative_to(data).as_posix()]
            for name in ("healthy", "mild", "severe"):
                column = f"probability_{name}"
                assert float(row[column]) == pytest.approx(float(theirs[column]), abs=1e-4)


@pytest.mark.parametrize("features", ("float16", *EIGHT_BIT))
def test_training_in_place_equals_training_from_copies(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    features: str,
) -> None:
    preload(preload_settings(features=features))
    modes = []
    for name, kind in (("in_place", "ext4"), ("copies", "nfs4")):
        monkeypatch.setattr("fpt_fast.cache.storage.file_system_type", lambda path, kind=kind: kind)
        with CacheReader(tmp_path / "cache") as reader:
            modes.append(reader.mode)
        train(train_settings(run=tmp_path / name))
    assert modes == ["mmap", "pread"]
    in_place, copies = (
        FptModel.from_pretrained(tmp_path / name / "best").state_dict()
        for name in ("in_place", "copies")
    )
    assert all(torch.equal(in_place[name], copies[name]) for name in in_place)


def test_live_features_are_quantised_like_those_of_a_cache(
    preload_settings: MakePreload, train_settings: MakeTrain, backbone: Path, tmp_path: Path
) -> None:
    preload(preload_settings(features="int8"))
    cached = train(train_settings(run=tmp_path / "cached"))
    settings = {
        "cache": "none",
        "backbone": str(backbone),
        "input_size": "48",
        "normalization": "backbone",
        "dtype": "float32",
        "batch_size": 5,
    }
    live = train(train_settings(run=tmp_path / "live", features="int8", **settings))
    half = train(train_settings(run=tmp_path / "half", **settings))
    for a, b, c in zip(
        cached.history.epochs, live.history.epochs, half.history.epochs, strict=True
    ):
        assert a.loss == pytest.approx(b.loss, rel=1e-4)
        assert a.loss != c.loss
    extra = FptModel.from_pretrained(tmp_path / "live" / "best").extra
    assert extra["features"]["features"] == "int8"


def test_resumed(preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path) -> None:
    preload(preload_settings(features="int8"))
    preload(preload_settings(cache=tmp_path / "f16"))
    train(train_settings(epochs=2))
    with pytest.raises(CheckpointError, match="features"):
        train(train_settings(epochs=2, resume=True, cache=str(tmp_path / "f16")))
    again = train(train_settings(epochs=2, resume=True))
    assert [epoch.epoch for epoch in again.history.epochs] == [0, 1]


def test_other_features_are_refused(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings(features="int8"))
    preload(preload_settings(cache=tmp_path / "f16"))
    with pytest.raises(CacheMismatch, match="features: the cache has int8, asked for float16"):
        preload(preload_settings())
    with pytest.raises(CacheMismatch, match="features: the cache has float16, asked for int8"):
        preload(preload_settings(cache=tmp_path / "f16", features="int8"))
    with pytest.raises(CacheMismatch, match=r"features: the cache has int8, this run asks for fl"):
        train(train_settings(features="float16"))
    run = train(train_settings()).run
    with pytest.raises(CacheMismatch, match=r"features: the run has int8, .* has float16"):
        evaluate(run=run, split="test", cache=str(tmp_path / "f16"))


def test_extended_and_repaired(
    preload_settings: MakePreload, backbone: Path, tmp_path: Path
) -> None:
    data = write_image_set(tmp_path / "grows", counts={"train": 2, "val": 1, "test": 1})
    settings = preload_settings(data=data, features="int8", batch_size=4)
    preload(settings)
    for label, name in enumerate(("healthy", "mild", "severe")):
        pixels = class_image(label, (48, 40), np.random.default_rng(label))
        write_image(data / "train" / name / "added.png", pixels)
    assert preload(settings).computed == 3
    whole = files_of(settings.cache)
    shard = settings.cache / "shard-00000.fpt"
    damaged = bytearray(shard.read_bytes())
    with CacheReader(settings.cache) as reader:
        layout, keys = reader.layout, reader.keys
    damaged[4096 + 5 * layout.record_bytes + layout.parts[2].offset] ^= 1
    shard.write_bytes(damaged)
    assert verify_cache(settings.cache).bad_keys == (keys[5],)
    rebuilt, report = repair(data=data, cache=settings.cache, backbone=str(backbone), batch_size=4)
    assert rebuilt == [keys[5]] and report.ok
    # The record was computed in the batch that it was first computed in.
    assert files_of(settings.cache) == whole


def test_conversion_is_resumed(
    preload_settings: MakePreload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    f16 = preload_settings().cache
    preload(preload_settings())
    convert(source=f16, target=tmp_path / "whole", batch_size=5)

    class StopsAtOnce:
        def __enter__(self) -> "StopsAtOnce":
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def check(self, state: str) -> None:
            raise Stopped(state)

    with monkeypatch.context() as patch:
        patch.setattr(converting, "stop_on_signals", StopsAtOnce)
        with pytest.raises(Stopped, match="run the same command to go on"):
            convert(source=f16, target=tmp_path / "stopped", batch_size=5)
    assert convert(source=f16, target=tmp_path / "stopped", batch_size=7).converted == 19
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_damage_is_not_converted(preload_settings: MakePreload, tmp_path: Path) -> None:
    f16 = preload_settings().cache
    preload(preload_settings())
    shard = f16 / "shard-00000.fpt"
    data = bytearray(shard.read_bytes())
    data[-5000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(CacheCorrupt, match="does not match its checksum"):
        convert(source=f16, target=tmp_path / "int8")


def test_conversions_that_are_refused(preload_settings: MakePreload, tmp_path: Path) -> None:
    f16 = preload_settings().cache
    preload(preload_settings())
    convert(source=f16, target=tmp_path / "int8")
    for dtype in EIGHT_BIT:
        with pytest.raises(ConfigError, match=r"int8 features, whose rounding cannot be undone"):
            convert(source=tmp_path / "int8", target=tmp_path / "x", dtype=dtype)
    with pytest.raises(ConfigError, match=r"dtype must be int8 or float8_e4m3fn, got 'float16'"):
        convert(source=tmp_path / "int8", target=tmp_path / "x", dtype="float16")
    for target in (f16, f16 / "inside"):
        with pytest.raises(ConfigError, match="must be another directory than the source"):
            convert(source=f16, target=target)
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        convert(source=f16, target=tmp_path / "x", batch_size=0)
    with pytest.raises(CacheMismatch, match=r"layout.dtype: the cache has 'int8', asked for 'flo"):
        convert(source=f16, target=tmp_path / "int8", dtype="float8_e4m3fn")
    assert not (tmp_path / "x").exists()
