"""A new user's way, by the commands of docs/quick-start.md: from DICOM files with a list of
findings to a calibrated, explained, exported model."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from images.dicom_files import dicom
from small_run import write_backbone

from fpt_fast.cli import main
from fpt_fast.images import read_image, to_network_input
from fpt_fast.records import Preprocessing, Reading
from helpers import ROOT

SECTION = "## All of it on DICOM files with a list of findings"
FINDINGS = ("opacity", "lines")
# The published frozen model at its size; here a tiny one stands in for it.
STAND_INS = {
    "vit_base_patch16_384": "VIT",
    "512": "48",
    "--epochs 20 --learning-rate 5e-4": "--epochs 6 --learning-rate 1e-2 --side-size 24",
}


IMAGES = 30


def write_study(folder: Path) -> None:
    """12-bit scans of 10 patients, every fourth stored inverted; some findings are unknown."""
    rng = np.random.default_rng(0)
    (folder / "scans").mkdir()
    lines = [",".join(("path", "patient", *FINDINGS))]
    for number in range(IMAGES):
        bright, striped = int(rng.random() < 0.5), int(rng.random() < 0.5)
        pixels = rng.integers(200, 1400, (56, 24)) + 700 * bright
        pixels[:: 8 if striped else 99] = 3500 - 700 * bright
        kind = "MONOCHROME1" if number % 4 == 0 else "MONOCHROME2"
        stored = (4095 - pixels if kind == "MONOCHROME1" else pixels).astype("<u2")
        scan = dicom(stored, 12, PhotometricInterpretation=kind)
        scan.save_as(folder / "scans" / f"{number:03d}.dcm", enforce_file_format=True)
        known = (["", bright][number % 9 > 0], ["-1", striped][number % 11 > 0])
        lines.append(f"scans/{number:03d}.dcm,P{number // 3:02d},{known[0]},{known[1]}")
    (folder / "findings.csv").write_text("\n".join(lines))


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.usefixtures("whole_figures", "small_pictures")
def test_from_dicoms_with_findings_to_a_calibrated_explained_exported_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_study(tmp_path)
    write_backbone(tmp_path / "VIT")
    text = (ROOT / "docs" / "quick-start.md").read_text().split(SECTION)[1].split("\n## ")[0]
    for written, stand_in in STAND_INS.items():
        assert written in text
        text = text.replace(written, stand_in)
    [shared] = re.findall(r"```yaml\n(.*?)```", text, re.S)
    [block] = re.findall(r"```bash\n(.*?)```", text, re.S)
    Path("study.yaml").write_text(shared)
    program, *commands = map(shlex.split, block.splitlines())
    assert program[:2] == ["pip", "install"] and len(commands) == 9
    for words in commands:
        assert words[0] == "fpt-fast" and main(words[1:]) == 0, words
    assert "of the kept tokens lie in the black padding" in capsys.readouterr().out
    card = Path("FOLDER/README.md").read_text()
    assert "images are brought to it by: padding" in card and "calibrated=True" in card

    predicted = rows_of(Path("predictions.csv"))
    explained = rows_of(Path("explained/explanations.csv"))
    assert [row["path"] for row in explained] == [row["path"] for row in predicted]
    drawn = list(Path("explained").glob("*/attention.png"))
    assert len(predicted) == len(drawn) == IMAGES
    session = onnxruntime.InferenceSession("model.onnx")
    told = json.loads(session.get_modelmeta().custom_metadata_map["fpt_fast"])
    assert (told["classes"], told["output"], told["calibrated"]) == ([*FINDINGS], "findings", True)
    assert told["fit"] == "pad" and told["window"] == "file" and len(told["temperatures"]) == 2
    reading = Reading(told["window"], told["dicom_frame"])
    for row, shown in zip(predicted[:8], explained, strict=False):
        ours = np.array([float(row[f"probability_{name}"]) for name in FINDINGS])
        feed = {}
        for name in ("frozen", "side"):
            size, mean, std = (tuple(told[key]) for key in (f"{name}_size", "mean", "std"))
            of = Preprocessing(size, mean, std, told["fit"])
            feed[f"{name}_pixels"] = to_network_input(read_image(row["path"], reading), of)[None]
        [out] = session.run(None, {name: pixels.numpy() for name, pixels in feed.items()})
        # The file is in f32, prediction in the dtype of the features, bf16 on some machines.
        np.testing.assert_allclose(out[0], ours, atol=0.05)
        called = [name for name, value in zip(FINDINGS, ours, strict=True) if value >= 0.5]
        assert row["predicted"] == shown["predicted"] == (";".join(called) or "(none)")
        shares = [float(shown[f"probability_{name}"]) for name in FINDINGS]
        assert shares == pytest.approx(ours.tolist(), abs=2e-3)
