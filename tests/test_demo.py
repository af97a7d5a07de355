"""The demo: its images are what they claim to be, and it runs to its last line."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_run import files_of

from fpt_fast.backbone import load_backbone
from fpt_fast.cli import main
from fpt_fast.demo import run
from fpt_fast.demo.needle import make_needle_dataset
from fpt_fast.images import load_image_set


@pytest.fixture(scope="module")
def needle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("needle") / "images"
    make_needle_dataset(root, images=240, size=256, seed=3)
    return root


def features(root: Path, split: str, look: Callable[[Path], np.ndarray]) -> tuple[np.ndarray, ...]:
    items = load_image_set(root).of_split(split)  # type: ignore[arg-type]
    return np.stack([look(item.path) for item in items]), np.array([item.label for item in items])


def probe_auc(root: Path, look: Callable[[Path], np.ndarray]) -> float:
    """Test AUC of a logistic regression on what ``look`` sees of an image."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=500))
    probe.fit(*features(root, "train", look))
    seen, labels = features(root, "test", look)
    return float(roc_auc_score(labels, probe.predict_proba(seen), multi_class="ovr"))


def test_the_same_settings_make_the_same_files(needle: Path, tmp_path: Path) -> None:
    make_needle_dataset(tmp_path / "again", images=240, size=256, seed=3)
    assert files_of(tmp_path / "again") == files_of(needle)
    make_needle_dataset(tmp_path / "other", images=240, size=256, seed=4)
    assert files_of(tmp_path / "other") != files_of(needle)


def test_every_split_has_every_class(needle: Path) -> None:
    images = load_image_set(needle)
    assert len(images.classes) >= 4 and len(images.items) == 240
    for split in ("train", "val", "test"):
        labels = [item.label for item in images.of_split(split)]  # type: ignore[arg-type]
        counts = np.bincount(labels, minlength=len(images.classes))
        assert counts.max() - counts.min() <= 1, (split, counts)


def test_the_digit_decides_and_the_rest_does_not(needle: Path) -> None:
    """The cut-out digit tells the class; the image shrunk as the side network sees it does not,
    nor does the image with the digit painted over."""
    with (needle / "boxes.csv").open() as file:
        boxes = {
            row["path"]: tuple(int(row[name]) for name in ("top", "left", "height", "width"))
            for row in csv.DictReader(file)
        }

    def grey(path: Path) -> np.ndarray:
        return np.asarray(Image.open(path).convert("L"), np.float32)

    def digit(path: Path) -> np.ndarray:
        top, left, height, width = boxes[path.relative_to(needle).as_posix()]
        cut = grey(path)[top : top + height, left : left + width]
        cut = np.asarray(Image.fromarray(cut).resize((8, 8)))
        # Light on dark or dark on light says nothing.
        return np.abs(cut - np.median(np.r_[cut[0], cut[-1], cut[:, 0], cut[:, -1]])).ravel()

    def shrunk(path: Path) -> np.ndarray:
        return np.asarray(Image.fromarray(grey(path)).resize((32, 32))).ravel()

    assert probe_auc(needle, digit) > 0.85
    assert probe_auc(needle, shrunk) < 0.65


def test_the_shipped_backbone(tmp_path: Path) -> None:
    weights = run.BACKBONE / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    backbone = load_backbone(run.BACKBONE)
    assert backbone.spec.num_tokens((512, 512)) == 1025
    assert backbone.spec.patch_size == (16, 16)


def test_the_demo_runs_to_its_last_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "INPUT_SIZE", 128)
    words = ["demo", "--output", str(tmp_path / "out"), "--images", "48", "--epochs", "1"]
    for _ in range(2):
        # The second time images and cache are found and the runs made anew.
        assert main(words) == 0
        last = capsys.readouterr().out.strip().splitlines()[-1]
        names = [word.partition("=")[0] for word in last.split()]
        assert names == ["demo:", "fpt_plus_auc", "side_alone_auc", "linear_probe_auc", "seconds"]
    written = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert 0 <= written["fpt_plus_auc"] <= 1
    assert (tmp_path / "out" / "fpt_plus" / "report.html").stat().st_size > 10_000


def test_without_scikit_image_it_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert "fpt-fast[demo]" in capsys.readouterr().err
