"""Explanations of image files: of the features that training saw, and of planted needles."""

import csv
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_run import files_of

from fpt_fast.cache import CacheReader
from fpt_fast.config import ConfigError
from fpt_fast.demo.needle import make_needle_dataset
from fpt_fast.demo.run import BACKBONE
from fpt_fast.pipeline import (
    PreloadSettings,
    TrainSettings,
    UnreadableImages,
    explain,
    explanation_arrays,
    export,
    predict,
    preload,
    train,
)
from fpt_fast.report.maps import attention_share, kept_share

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


@pytest.mark.parametrize("features", ["float16", "int8"])
def test_any_image_is_explained_as_the_cache_has_it(
    features: str,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    data: Path,
    tmp_path: Path,
) -> None:
    preload(preload_settings(features=features))
    run = train(train_settings(epochs=1)).run
    assert "where the prompts look" in (run / "report.html").read_text()
    out = tmp_path / "explained"
    result = explain(run=run, images=(data / "test",), output=out, dtype="float32", batch_size=4)
    assert len(result.examples) == 6
    predicted = predict(
        run=run, images=(data / "test",), output=tmp_path / "p.csv", dtype="float32"
    ).predictions
    assert predicted.probabilities is not None
    with CacheReader(tmp_path / "cache") as reader:
        for number, example in enumerate(result.examples):
            assert example.key == predicted.keys[number]
            torch.testing.assert_close(
                example.probabilities, predicted.probabilities[number], rtol=0, atol=1e-3
            )
            key = Path(example.key).relative_to(data).as_posix()
            record = reader.read([reader.row(key)])
            assert torch.equal(example.index, record.index[0])
            assert example.weights is not None
            torch.testing.assert_close(
                example.weights.sum(-1), torch.ones(example.weights.shape[:-1])
            )
    with (out / "explanations.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == list(predicted.keys)
    columns = [column for column in rows[0] if column.startswith("probability_")]
    assert columns == [f"probability_{name}" for name in result.classes]
    told = torch.tensor([[float(row[column]) for column in columns] for row in rows])
    torch.testing.assert_close(told, predicted.probabilities, rtol=0, atol=1e-3)
    for row, example in zip(rows, result.examples, strict=True):
        folder = out / row["folder"]
        for name in ("kept", "attention", "heads-kept", "heads-attention"):
            with Image.open(folder / f"{name}.png") as picture:
                assert picture.size[0] > 600
        arrays = np.load(folder / "arrays.npz", allow_pickle=False)
        for name, value in explanation_arrays(example).items():
            assert np.array_equal(arrays[name], value), name
        assert arrays["kept"].shape == arrays["attention"].shape == (2, 6, 6, 6)
        attention = attention_share(example)
        top, left = int(row["top"]) // 8, int(row["left"]) // 8
        assert float(attention[top, left]) == float(attention.max())
        assert float(row["attention"]) == pytest.approx(float(attention.max()), abs=1e-6)


@pytest.mark.usefixtures("small_pictures")
def test_grades_and_numbers_are_explained_as_predict_tells_them(
    preload_settings: MakePreload, train_settings: MakeTrain, data: Path, tmp_path: Path
) -> None:
    lines = ["path,split,age"]
    for number, path in enumerate(sorted(data.rglob("*.png"))):
        key = path.relative_to(data)
        lines.append(f"{key.as_posix()},{key.parts[0]},{100 + 3.25 * number}")
    (data / "ages.csv").write_text("\n".join(lines))
    preload(preload_settings())
    grades = train(train_settings(loss="smooth_l1", run=tmp_path / "grades")).run
    listed = {"data": data / "ages.csv", "value_column": "age"}
    numbers = train(train_settings(**listed, run=tmp_path / "numbers")).run
    for run, columns in ((grades, ("predicted", "grade")), (numbers, ("value_age",))):
        images, out = (data / "test",), tmp_path / f"{run.name}-explained"
        explain(run=run, images=images, output=out, dtype="float32", batch_size=4)
        table = tmp_path / "p.csv"
        predict(run=run, images=images, output=table, dtype="float32", overwrite=True)
        told, expected = (
            list(csv.DictReader(file.open())) for file in (out / "explanations.csv", table)
        )
        assert set(expected[0]) == {"path", *columns} and len(told) == 6
        for row, wanted in zip(told, expected, strict=True):
            assert row["path"] == wanted["path"] and float(row["attention"]) > 0
            assert float(row[columns[-1]]) == pytest.approx(float(wanted[columns[-1]]), abs=1e-3)
            assert row[columns[0]] == wanted[columns[0]] or columns[0] == columns[-1]
            arrays = np.load(out / row["folder"] / "arrays.npz", allow_pickle=False)
            assert arrays["output"].item() == pytest.approx(float(row[columns[-1]]), rel=1e-6)
            assert "probabilities" not in arrays
        page = (run / "report.html").read_text()
        assert "where the prompts look" in page and "off by" in page
        assert page.count('<td class="picture"><img') == 6
    assert "; it is 1" in page  # of the images shown with their tokens


@pytest.mark.usefixtures("small_pictures")
def test_an_earlier_run_is_replaced_as_a_whole_or_not_at_all(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    preload(preload_settings())
    run = train(train_settings(epochs=1)).run
    out, images = tmp_path / "explained", sorted((data / "test").rglob("*.png"))
    explain(run=run, images=images[:3], output=out)
    before = files_of(out)
    with pytest.raises(FileExistsError, match="choose another --output, or replace .* --overwrite"):
        explain(run=run, images=images[3:], output=out)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"")
    with pytest.raises(UnreadableImages):
        explain(run=run, images=[broken], output=out, overwrite=True)
    drawn = []

    def fail_at_the_second(*arguments: object) -> bytes:
        drawn.append(arguments)
        if len(drawn) > 1:
            raise OSError("no space left on device")
        return b""

    with monkeypatch.context() as patch:
        patch.setattr("fpt_fast.pipeline.explaining.draw_sheet", fail_at_the_second)
        with pytest.raises(OSError, match="no space"):
            explain(run=run, images=images[3:], output=out, overwrite=True)
        with pytest.raises(OSError, match="no space"):
            explain(run=run, images=images[3:], output=tmp_path / "new")
    assert files_of(out) == before and not (tmp_path / "new").exists()
    explain(run=run, images=images[3:5], output=out, overwrite=True)
    folders = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert folders == [f"{n:04d}-{path.stem}" for n, path in enumerate(images[3:5])]
    assert not list(tmp_path.glob(".*"))
    # What is no earlier run's is not replaced at all.
    for other in (data, images[0]):
        with pytest.raises(OSError, match=r"not empty and has no explanations\.csv|is a file"):
            explain(run=run, images=images[:1], output=other, overwrite=True)


@pytest.mark.usefixtures("small_pictures")
def test_predictions_and_exports_are_not_replaced_unasked(
    preload_settings: MakePreload, train_settings: MakeTrain, data: Path, tmp_path: Path
) -> None:
    preload(preload_settings())
    run = train(train_settings(epochs=1)).run
    for name, make in (
        ("p.csv", functools.partial(predict, run=run, images=[data / "test"])),
        ("m.pt2", functools.partial(export, run=run, format="program")),
    ):
        output = tmp_path / name
        output.write_text("mine")
        with pytest.raises(FileExistsError, match=f"{name} is there already; .* --overwrite"):
            make(output=output)
        assert output.read_text() == "mine"
        with pytest.raises(IsADirectoryError, match="must be a file"):
            make(output=data, overwrite=True)
        make(output=output, overwrite=True)
        assert output.stat().st_size > 100


def test_a_side_network_alone_explains_nothing(
    preload_settings: MakePreload, train_settings: MakeTrain, data: Path
) -> None:
    preload(preload_settings())
    run = train(train_settings(epochs=1, fusion=False)).run
    with pytest.raises(ConfigError, match="side network alone"):
        explain(run=run, images=(data / "test",), output=None)


def test_prompts_look_at_the_needle_far_more_often_than_chance(tmp_path: Path) -> None:
    data = tmp_path / "images"
    make_needle_dataset(data, images=60, size=256, seed=0, classes=(0, 7), splits=(0.6, 0.2, 0.2))
    cache = tmp_path / "cache"
    preload(
        data=data,
        backbone=str(BACKBONE),
        cache=cache,
        input_size="256",
        normalization="backbone",
    )
    run = train(
        data=data,
        cache=str(cache),
        run=tmp_path / "run",
        side_size="32",
        epochs=6,
        learning_rate=5e-3,
        report_images=0,
    ).run
    examples = explain(run=run, images=(data / "test",), output=None).examples
    with (data / "boxes.csv").open() as file:
        boxes = {row["path"]: row for row in csv.DictReader(file)}
    found, attention, kept, area = 0, 0.0, 0.0, 0.0
    for example in examples:
        box = boxes[Path(example.key).relative_to(data).as_posix()]
        top, left, height, width = (int(box[k]) for k in ("top", "left", "height", "width"))
        needle = np.zeros((16, 16), dtype=bool)  # patches of 16 px that the needle touches
        needle[
            top // 16 : (top + height - 1) // 16 + 1, left // 16 : (left + width - 1) // 16 + 1
        ] = 1
        look = attention_share(example).numpy()
        found += bool(needle.flat[look.argmax()])
        attention += float(look[needle].sum() / look.sum())
        kept += float(kept_share(example).numpy()[needle].mean())
        area += float(needle.mean())
    count = len(examples)
    assert count == 12
    assert area / count < 0.07  # chance: of the highest patch to lie there, and of attention
    assert found / count > 0.7
    assert attention / count > 3 * area / count
    assert kept / count > 0.4  # chance: 0.2, the share of tokens that is kept
