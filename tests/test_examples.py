"""The examples run, as their own files say they do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import write_backbone

from fpt_fast.pipeline import preload
from helpers import write_image_set

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images and their cache."""
    root = tmp_path_factory.mktemp("examples")
    write_image_set(root / "DATA")
    preload(
        data=root / "DATA",
        backbone=str(write_backbone(root / "VIT")),
        cache=root / "CACHE",
        input_size="48",
        normalization="backbone",
    )
    return root


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("lightning_module.py", r"validation AUC: (\d\.\d{3})"),
        ("monai_transforms.py", r"test AUC: (\d\.\d{3})"),
    ],
)
def test_example(script: str, said: str, folder: Path) -> None:
    words = ["--data", "DATA", "--cache", "CACHE", "--side-size", "24", "--epochs", "6"]
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *words, "--learning-rate", "1e-2"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    auc = re.search(said, done.stdout)
    assert auc is not None, done.stdout
    # The classes differ by the place and the colour of a bar: six epochs tell them apart.
    assert float(auc[1]) > 0.6


def test_every_example_is_listed_and_tried() -> None:
    listed = re.findall(r"`(\w+\.(?:py|ipynb))`", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")
    )
