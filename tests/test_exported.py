"""The measurement of exported files: every way gives the same answer, and the document says what
was measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm

from benchmarks.exported import DOCUMENT, END, NOT_YET, RESULTS, START, TINY_MODEL, WAYS, render

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_way_is_measured_and_agrees(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.exported", "--output", tmp_path, "--tiny", "--rounds=1"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "python"), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "exported.json").read_text(encoding="utf-8"))
    assert json.loads(done.stdout[done.stdout.index("{\n") :]) == found
    assert list(found["seconds"]) == list(WAYS) and min(found["seconds"].values()) > 0
    # Of the library's own choice, bf16 perhaps; the others run in f32.
    differences = found["difference"]
    assert differences.pop("predictor") < 0.05 and max(differences.values()) < 1e-4
    # The frozen model's layers stand in each file, in f32.
    layers = timm.create_model(TINY_MODEL).blocks.parameters()
    assert min(found["bytes"].values()) > 4 * sum(weights.numel() for weights in layers)


def test_the_table_has_a_row_of_every_way() -> None:
    numbers = dict.fromkeys(WAYS, 0.25)
    table = render(
        {
            "size": 512,
            "model": "a",
            "machine": "b",
            "rounds": 5,
            "bytes": {"onnx": 400e6, "program": 300e6},
            "seconds": numbers,
            "difference": numbers,
        }
    )
    assert table.count("| 0.25 |") == len(WAYS)
    assert table.count("| 2e-01 |") == len(WAYS) - 1
    assert (
        "onnxruntime, f32 | 0.25 | 400 |" in table and "torch.export, f32 | 0.25 | 300 |" in table
    )


def test_the_document_says_what_was_measured() -> None:
    block = DOCUMENT.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].strip()
    if RESULTS.exists():
        assert block == render(json.loads(RESULTS.read_text(encoding="utf-8")))
    else:
        assert block == NOT_YET
