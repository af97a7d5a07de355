"""The commands of README and documents run, one after the other, in a folder with all that they
name; those of ``test_docs.py`` and ``test_walk.py`` apart, and those that need a GPU, torchrun or
files of the authors' code, which their own tests run."""

import csv
import itertools
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_run import write_backbone

from fpt_fast.cli import main
from helpers import ROOT, class_image, write_image, write_image_set

CLASSES = ("none", "mild", "severe")
LISTS = (
    *("list.csv", "MESSIDOR2/fpt-fast-messidor2.csv", "DDR/fpt-fast-ddr.csv"),
    *("ISIC2016/fpt-fast-isic2016.csv", "ISIC2018/fpt-fast-isic2018.csv"),
    *("DDSM/fpt-fast-ddsm.csv", "CMMD/fpt-fast-cmmd.csv"),
    *("COVID/fpt-fast-covid.csv", "CHNCXR/fpt-fast-chncxr.csv"),
)
# A published frozen model at its size, and what trains for long; a hub that is not there.
STAND_INS = {
    "vit_base_patch16_384": "VIT",
    "--input-size 512": "--input-size 48",
    "--input-size 768x512": "--input-size 72x48",
    "--side-size 192x128": "--side-size 32x24",
    "--epochs 20": "",
    " --repo OWNER/NAME": "",
    # As many models as seeds, of which quick-start.md has three.
    "--seed 0-4": "--seed 0-1",
    "--repeats 3": "--repeats 2",
    # A CT in Hounsfield units has them in DICOM files, for which test_walk.py goes a whole way.
    "--window 40/400": "--window 400/2000",
}
PAGES = (
    *("docs/quick-start.md", "docs/labels.md", "docs/medical-images.md"),
    *("docs/methods.md", "docs/datasets.md"),
)
# Of a section that test_walk.py goes through.
LATER = "## All of it on DICOM files"


def write_world(root: Path) -> None:
    """Everything that the pages take for granted, by the names that they give it."""
    write_backbone(root / "VIT")
    for name in ("DATA", "images"):
        write_image_set(root / name)
    write_image_set(root / "new-images", counts={"": 1})
    tall = {"train": 3, "val": 2, "test": 2}
    write_image_set(root / "mammograms", counts=tall, size=(72, 40))
    rng = np.random.default_rng(0)
    for split, count in tall.items():
        for label, name in enumerate(CLASSES):
            for number in range(count):
                path = root / "ct" / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                grey = rng.integers(0, 800, (48, 48)) + 500 * label
                Image.fromarray(grey.astype(np.uint16)).save(path)
    for written in LISTS:
        write_list(root / written)


def write_list(path: Path, patients: int = 20) -> None:
    """Two images of each patient, with all columns that the pages name."""
    rng = np.random.default_rng(1)
    path.parent.mkdir(exist_ok=True)
    rows = []
    for number in range(2 * patients):
        patient, grade = f"P{number // 2:02d}", number // 2 % 3
        image = Path("scans") / f"{number:02d}.png"
        write_image(path.parent / image, class_image(grade, (48, 48), rng))
        findings = {name: int(rng.random() < 0.5) for name in ("effusion", "mass", "fibrosis")}
        row = {"path": image, "label": CLASSES[grade], "file": image, "grade": CLASSES[grade]}
        rows.append(
            {**row, "patient": patient, "patient_id": patient, "age": 40 + 10 * grade, **findings}
        )
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def commands_of(page: str) -> list[list[str]]:
    """The words behind ``fpt-fast`` of each command, with stand-ins."""
    text = (ROOT / page).read_text(encoding="utf-8").partition(LATER)[0]
    found = []
    for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for written, stand_in in STAND_INS.items():
                line = line.replace(written, stand_in)
            words = shlex.split(line, comments=True)
            if words and words[0] == "fpt-fast":
                found.append(words[1:])
    return found


def prepared(words: list[str], folder: Path) -> list[str]:
    """``words`` for tiny images and one epoch; what an earlier block of the page wrote is gone."""
    command, given = words[0], dict(itertools.pairwise(words))
    if "--resume" in words:
        return words
    for option in {"preload": ("--cache",), "train": ("--run",), "sweep": ("--run",)}.get(
        command, ()
    ):
        shutil.rmtree(folder / given[option], ignore_errors=True)
    if command == "preload" and "--input-size" not in given:
        words = [*words, "--input-size", "48"]
    if command in ("train", "sweep"):
        words = [*words, "--epochs", "1"]
        if "--cache" not in given:  # a compared method
            words += ["--input-size", "48"]
        elif "--side-size" not in given:
            words += ["--side-size", "24"]
    return words


def run_commands(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(folder)
    monkeypatch.chdir(folder)
    commands = commands_of(page)
    assert commands
    for words in commands:
        assert main(prepared(words, folder)) == 0, words


@pytest.mark.slow
@pytest.mark.usefixtures("whole_figures")
def test_commands_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_commands("README.md", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_commands(page, tmp_path, monkeypatch)
