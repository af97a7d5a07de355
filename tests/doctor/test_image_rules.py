"""Planted faults in data sets, each found, and nothing found where nothing is wrong."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fpt_fast.doctor import Finding, examine_images, find_in_images, look_alike_pairs
from fpt_fast.images import load_image_set
from helpers import write_image

CLASSES = ("healthy", "sick")
COUNTS = {"train": 12, "val": 10, "test": 10}


def picture(seed: int, size: tuple[int, int] = (40, 44)) -> np.ndarray:
    """Smooth blobs, none like another: [h, w, 3] u8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (7, 8, 3), dtype=np.uint8))
    return np.array(coarse.resize(size[::-1], Image.Resampling.BICUBIC))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    seed = 0
    for split, count in COUNTS.items():
        for name in CLASSES:
            for number in range(count):
                write_image(tmp_path / split / name / f"{number}.png", picture(seed))
                seed += 1
    return tmp_path


def findings(root: Path, input_size: tuple[int, int] | None = None) -> list[Finding]:
    images = load_image_set(root)
    facts, errors = examine_images(images.items)
    return find_in_images(facts, errors, images.classes, input_size)


def serious(found: Sequence[Finding]) -> list[str]:
    return [str(finding) for finding in found if finding.severity != "note"]


def only(found: Sequence[Finding]) -> Finding:
    [finding] = [finding for finding in found if finding.severity != "note"]
    return finding


def test_nothing_is_wrong(root: Path) -> None:
    assert serious(findings(root, (32, 32))) == []


def test_one_picture_in_two_splits_also_in_another_file_format(root: Path) -> None:
    write_image(root / "test" / "sick" / "copy.bmp", picture(0))
    assert (root / "train" / "healthy" / "0.png").is_file()
    leak, contradiction = [f for f in findings(root) if f.severity == "error"]
    assert "1 picture stands in more than one split" in leak.what
    assert leak.where == ("test/sick/copy.bmp = train/healthy/0.png",)
    assert "more than one label" in contradiction.what
    assert contradiction.where == ("test/sick/copy.bmp (sick) = train/healthy/0.png (healthy)",)


def test_copies_in_one_place(root: Path) -> None:
    write_image(root / "train" / "healthy" / "again.png", picture(0))
    found = only(findings(root))
    assert found.severity == "warning" and "more than once in one split" in found.what
    assert found.where == ("train/healthy/0.png = train/healthy/again.png",)


@pytest.mark.parametrize("change", ["saved again", "scaled", "brightened"])
def test_the_same_picture_with_other_pixels(root: Path, change: str) -> None:
    pixels = picture(0, (80, 88))
    write_image(root / "train" / "healthy" / "large.png", pixels)
    path = root / "test" / "healthy" / "large.jpg"
    if change == "saved again":
        Image.fromarray(pixels).save(path, quality=80)
    elif change == "scaled":
        Image.fromarray(pixels).resize((70, 64)).save(path, quality=90)
    else:
        Image.fromarray((pixels * 0.8 + 40).astype(np.uint8)).save(path, quality=90)
    assert any(
        "pairs look the same" in f.what
        and "test/healthy/large.jpg = train/healthy/large.png" in f.where
        for f in findings(root)
    )


def test_what_cannot_be_decoded(root: Path) -> None:
    (root / "train" / "sick" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    found = only(findings(root))
    assert found.severity == "error" and found.where[0].startswith("train/sick/3.png: ")


def test_blank_images_are_not_copies_of_each_other(root: Path) -> None:
    for split in ("train", "test"):
        write_image(root / split / "sick" / "0.png", np.full((40, 44), 7, np.uint8))
    assert only(findings(root)).where == ("test/sick/0.png", "train/sick/0.png")


def test_small_and_stretched_images(root: Path) -> None:
    write_image(root / "train" / "sick" / "0.png", picture(1000, (20, 21)))
    write_image(root / "train" / "sick" / "1.png", picture(1001, (90, 40)))
    small, stretched = [f for f in findings(root, (32, 32)) if f.severity != "note"]
    assert small.where == ("train/sick/0.png: 20x21",) and "32x32" in small.what
    assert stretched.where == ("train/sick/1.png: 90x40",)


def test_depths_and_12_bit_values_in_16_bit_files(root: Path) -> None:
    deep = picture(1000)[:, :, 0].astype(np.uint16)
    write_image(root / "train" / "sick" / "0.png", deep)
    mixed, dark = [f for f in findings(root) if f.severity != "note"]
    assert "63 images have 8 bits a sample and 1 image has 16" in mixed.what
    assert dark.where[0].startswith("train/sick/0.png: values ")


def test_imbalance_and_empty_places(root: Path) -> None:
    for number in range(11):
        (root / "train" / "sick" / f"{number}.png").unlink()
    shutil.rmtree(root / "test" / "sick")
    text = "\n".join(serious(findings(root)))
    assert "the largest class has 12 times the training images" in text
    assert "sick: 1 in train" in text and "1 class has no image in the test split" in text


def test_a_class_that_its_size_gives_away(root: Path) -> None:
    for split, count in COUNTS.items():
        for number in range(count):
            path = root / split / "sick" / f"{number}.png"
            pixels = np.array(Image.open(path))
            write_image(path, pixels[:-2])
    found = only(findings(root))
    assert "the size of an image gives its class away" in found.what and "100%" in found.what


def test_unrelated_sizes_give_nothing_away(root: Path) -> None:
    for split, count in COUNTS.items():
        for name in CLASSES:
            for number in range(count):
                path = root / split / name / f"{number}.png"
                write_image(path, np.array(Image.open(path))[: 34 + number % 5])
    assert serious(findings(root)) == []


def test_look_alikes_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpt_fast.doctor.look_alikes._BLOCK", 3)
    rng = np.random.default_rng(0)
    thumbnails = [rng.random((16, 17), dtype=np.float32) for _ in range(10)]
    thumbnails[8] = thumbnails[1] * 0.9 + 0.05
    thumbnails[4] = np.full((16, 17), 0.5, np.float32)
    thumbnails[5] = np.full((16, 17), 0.5, np.float32)
    assert look_alike_pairs(thumbnails) == [(1, 8)]
    assert look_alike_pairs(thumbnails[:1]) == []
