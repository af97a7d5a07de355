"""The offline tasks: real images, honest splits, the layout that preload and train take."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import files_of

from fpt_fast.demo.tasks import NEEDLE_PX, SHARES, TASKS, TEXTURES, TILE, make_needle, make_task
from fpt_fast.images import load_image_set

CLASSES = {"digits": 10, "faces": 2, "textures": 3}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_a_folder_of_splits(name: str, tmp_path: Path) -> None:
    make_task(name, tmp_path / "data", images=80, size=64 if name in CLASSES else 128, seed=1)
    images = load_image_set(tmp_path / "data")
    assert len(images.classes) == CLASSES.get(name, 4)
    assert abs(len(images.items) - 80) <= len(images.classes) * 3
    for split, share in zip(("train", "val", "test"), SHARES, strict=True):
        counts = np.bincount([item.label for item in images.of_split(split)])  # type: ignore[arg-type]
        assert len(counts) == len(images.classes) and counts.min() >= 1
        assert abs(counts.sum() / len(images.items) - share) < 0.06
    with Image.open(images.items[0].path) as image:
        assert image.size in ((64, 64), (128, 128)) and image.mode == "RGB"


@pytest.mark.parametrize("name", ["digits", "textures"])
def test_equal_settings_make_equal_files(name: str, tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_task(name, tmp_path / folder, images=70, size=64, seed=seed)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b") != files_of(tmp_path / "c")


@pytest.mark.parametrize("name", ["digits", "faces"])
def test_no_image_is_in_two_splits(name: str, tmp_path: Path) -> None:
    make_task(name, tmp_path / "data", images=200, size=32)
    splits: dict[bytes, set[str]] = {}
    for item in load_image_set(tmp_path / "data").items:
        splits.setdefault(item.path.read_bytes(), set()).add(item.split)
    assert len(splits) > 190 and all(len(found) == 1 for found in splits.values())


def test_texture_splits_share_no_pixel(tmp_path: Path) -> None:
    make_task("textures", tmp_path / "data", images=120, size=64)
    rows: dict[str, set[int]] = {}
    with (tmp_path / "data" / "boxes.csv").open() as file:
        for box in csv.DictReader(file):
            top = int(box["top"])
            rows.setdefault(box["path"].split("/")[0], set()).update(range(top, top + TILE))
    assert set(rows) == {"train", "val", "test"} and len(rows["train"]) > 150
    assert not rows["train"] & rows["val"] and not rows["val"] & rows["test"]
    assert not rows["train"] & rows["test"]
    with Image.open(next((tmp_path / "data" / "train" / TEXTURES[0]).iterdir())) as image:
        assert np.asarray(image).std() > 5


def test_a_harder_needle_is_smaller(tmp_path: Path) -> None:
    heights = {}
    for difficulty in NEEDLE_PX:
        make_needle(tmp_path / difficulty, difficulty=difficulty, images=40, size=256)
        with (tmp_path / difficulty / "boxes.csv").open() as file:
            heights[difficulty] = np.mean([int(row["height"]) for row in csv.DictReader(file)])
    assert 1.4 * heights["hard"] < heights["medium"] and 1.4 * heights["medium"] < heights["easy"]


@pytest.mark.parametrize(
    ("name", "images", "says"),
    [
        ("zebra", 80, "task must be one of digits, faces"),
        ("faces", 300, "faces has 200 images, got images=300"),
        ("digits", 20, "20 images leave a class without"),
        ("textures", 4, "4 images leave a class without"),
    ],
)
def test_refusals(tmp_path: Path, name: str, images: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make_task(name, tmp_path / "data", images=images, size=64)


def test_another_folder_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="no digits data set"):
        make_task("digits", tmp_path / "mine", images=80, size=64)
    assert (tmp_path / "mine" / "thesis.txt").exists()
