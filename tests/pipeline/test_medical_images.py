"""DICOM, windows, padding and inputs that are not square, from preload to predict."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images.dicom_files import dicom, save

from fpt_fast.cache import CacheMismatch, CacheReader
from fpt_fast.config import ConfigError
from fpt_fast.images import read_image, to_network_input
from fpt_fast.pipeline import (
    PreloadSettings,
    TrainSettings,
    UnreadableImages,
    doctor,
    evaluate,
    predict,
    preload,
    repair,
    train,
)
from fpt_fast.pipeline.features import FeaturePlan, load_recorded_backbone
from fpt_fast.records import Reading
from fpt_fast.selection import select_features

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]
CHOSEN = {"input_size": "72x40", "fit": "pad", "window": "2000/1500"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Tall 12-bit DICOM images of two classes: bright above, or bright below."""
    rng = np.random.default_rng(0)
    for split, count in {"train": 6, "val": 3, "test": 3}.items():
        for label, name in enumerate(("above", "below")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(1000, 2000, (90, 30)).astype(np.uint16)
                half = slice(45, None) if label else slice(45)
                pixels[half] += 1000
                elements = {"PatientID": f"{name}-{number}"}
                save(folder / f"{number}.dcm", dicom(pixels, 12, **elements))
    return tmp_path / "images"


def test_from_dicom_to_predictions(
    data: Path, preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings(**CHOSEN, normalization="auto"))
    with CacheReader(tmp_path / "cache") as reader:
        recorded = reader.fingerprint
        assert (recorded["fit"], recorded["window"]) == ("pad", "2000/1500")
        assert recorded["input_size"] == [72, 40] and "dicom_frame" not in recorded
        plan = FeaturePlan.from_json({**recorded, **reader.notes})
        backbone = load_recorded_backbone(
            plan, backbone=None, checkpoint_path=None, dtype="auto", device="cpu", attention="auto"
        )
        key = "train/below/1.dcm"
        pixels = to_network_input(read_image(data / key, Reading("2000/1500")), plan.preprocessing)
        assert pixels.shape == (3, 72, 40)
        kept = select_features(
            backbone, pixels[None], layers=plan.layers, token_ratio=0.2, importance="global"
        )
        stored = reader.read([reader.row(key)])
        assert plan.layout.kept == int(0.2 * (1 + 9 * 5))
        torch.testing.assert_close(stored.kv.float(), kept.kv.float(), rtol=0.02, atol=0.02)
        assert torch.equal(stored.index, kept.index)
    trained = train(train_settings(side_size="32x16", epochs=8, batch_size=4))
    assert trained.history.best_value == 1.0
    assert evaluate(run=tmp_path / "run").values["auc"] == trained.metrics.values["auc"]
    live = predict(run=tmp_path / "run", images=(data / "test",), output=tmp_path / "p.csv")
    for cached, image in zip(
        (tmp_path / "run" / "predictions.csv").read_text().splitlines()[1:],
        live.predictions.probabilities.tolist(),
        strict=True,
    ):
        # The frozen pass of predict runs in other batches than that of preload.
        assert [float(cell) for cell in cached.split(",")[3:]] == pytest.approx(image, abs=5e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"window": "full"}, "window"), ({"fit": "stretch"}, "fit"), ({"dicom_frame": 1}, "dicom")],
)
def test_a_cache_of_another_reading_is_refused(
    changes: dict[str, Any],
    named: str,
    data: Path,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
) -> None:
    preload(preload_settings(**CHOSEN))
    with pytest.raises(CacheMismatch, match=named):
        preload(preload_settings(**CHOSEN | changes))
    train(train_settings(side_size="16x8", epochs=1))
    preload(preload_settings(**CHOSEN | changes, cache=tmp_path / "other"))
    with pytest.raises(CacheMismatch, match=named):
        evaluate(run=tmp_path / "run", cache=str(tmp_path / "other"))
    with pytest.raises(CacheMismatch, match="window: the cache has 2000/1500, .* asks for full"):
        train(train_settings(window="full", run=tmp_path / "r2"))


def test_repair_reads_the_images_as_the_cache_has_them(
    data: Path, preload_settings: MakePreload, backbone: Path, tmp_path: Path
) -> None:
    preload(preload_settings(**CHOSEN))
    shard = max((tmp_path / "cache").glob("*"), key=lambda path: path.stat().st_size)
    whole = shard.read_bytes()
    with shard.open("r+b") as file:
        file.seek(len(whole) // 2)
        file.write(b"\xff" * 64)
    bad, report = repair(
        data=data, cache=tmp_path / "cache", backbone=str(backbone), batch_size=5, workers=2
    )
    assert len(bad) == 1 and report.ok
    assert shard.read_bytes() == whole


def test_settings_that_say_nothing_new_leave_the_fingerprint_as_it_was(
    data: Path, preload_settings: MakePreload, tmp_path: Path
) -> None:
    preload(preload_settings())
    with CacheReader(tmp_path / "cache") as reader:
        assert not {"fit", "window", "dicom_frame", "features"} & set(reader.fingerprint)
        plan = FeaturePlan.from_json(json.loads(json.dumps(reader.fingerprint)))
    assert plan.reading == Reading() and plan.preprocessing.fit == "stretch"


def test_frames_are_refused_before_any_work(
    data: Path, preload_settings: MakePreload, tmp_path: Path
) -> None:
    frames = np.zeros((2, 8, 8), np.uint16)
    save(data / "train" / "above" / "many.dcm", dicom(frames, 12))
    with pytest.raises(UnreadableImages, match=r"many.dcm: it has 2 frames"):
        preload(preload_settings())
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match="window must be file"):
        preload(preload_settings(window="dark"))
    with pytest.raises(ConfigError, match="counts from 1"):
        preload(preload_settings(dicom_frame=0))


def test_the_doctor_tells_what_padding_takes(
    data: Path,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "fpt_fast")
    preload(preload_settings(fit="pad"))
    cache = tmp_path / "cache"
    assert f"told of the data as preload was and of --cache {cache}" in caplog.text
    # Of an input of 48x48 images of 90x30 take 16 columns: 2 of 6 patches a row.
    found = [str(f) for f in doctor(data=data, cache=cache).findings if "padding" in f.what]
    with CacheReader(cache) as reader:
        index = reader.read(range(len(reader))).index.long()
    column = (index[index > 0] - 1) % 6
    share = ((column < 2) | (column > 3)).float().mean()
    assert found[0].startswith("warning") == bool(share >= 0.2)
    assert f"{share:.0%} of the kept tokens lie in the black padding" in found[0]
    assert "takes 67% of the input" in found[0] and len(found) == 1
    # A run brings both, and nothing is said of stretching, which padding is instead of.
    run = train(train_settings(epochs=1)).run
    said = str(doctor(run=run))
    assert f"{share:.0%} of the kept tokens lie" in said and "stretched by" not in said
    assert "with --data, too, this says" in str(doctor(cache=cache))
    # Before there is a cache, and as its images would be fitted.
    asked = doctor(data=data, input_size="48", fit="pad")
    assert "(--fit pad) takes 67% of it" in str(asked) and "stretched by" not in str(asked)
    assert "stretched by 1.5 or more" in str(doctor(data=data, input_size="48"))


def test_the_doctor_says_what_a_cache_has_other_than_asked_for(
    data: Path, preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings(fit="pad", input_size="64x40"))
    cache = tmp_path / "cache"
    # As train refuses it.
    with pytest.raises(CacheMismatch, match="input_size"):
        train(train_settings(input_size="48", fit="pad"))
    asked = doctor(data=data, cache=cache, input_size="48", fit="pad")
    [other] = [f for f in asked.findings if "another input" in f.what]
    assert other.where == ("input_size: the cache has 64x40, 48 is asked for",) and not asked.ok
    # What is said beside it is of the cache.
    plain = doctor(data=data, cache=cache)
    assert [f for f in asked.findings if f != other] == list(plain.findings)
    assert "of the kept tokens lie in the black padding" in str(plain)
    [fit] = [f for f in doctor(cache=cache, fit="stretch").findings if f.where]
    assert fit.where == ("fit: the cache has pad, stretch is asked for",)
    run = train(train_settings(epochs=1)).run
    preload(preload_settings(fit="pad", cache=tmp_path / "other"))
    assert "the cache has 48x48, 64x40 is asked" in str(doctor(run=run, cache=tmp_path / "other"))
    assert "another input" not in str(doctor(run=run))


def test_the_doctor_asks_for_no_data_that_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("path,label\n,1\n")
    said = doctor(data=tmp_path / "rows.csv", input_size="48", fit="pad")
    assert not said.ok and "with --data, too" not in str(said) and "padded" not in str(said)
