"""The papers' tables by one command, the lists of public data sets, and what memory is counted."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from small_run import write_backbone

from benchmarks.tables import __main__ as tables
from benchmarks.tables import published
from benchmarks.tables.memory import Memory
from benchmarks.tables.publish import publish
from benchmarks.tables.published import READERS, published_auc, write_list
from benchmarks.tables.runs import Run, best_validation
from benchmarks.tables.summary import draw, mean_interval
from benchmarks.tables.variants import TABLES, Options, Variant
from fpt_fast.accounting import Account
from fpt_fast.config import PEER_METHODS
from fpt_fast.images import dataset_preset, load_image_set, preset_names
from fpt_fast.records import Predictions
from helpers import ROOT


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("table") / "vit")


def words(output: Path, backbone: Path, *more: str) -> list[str]:
    small = ["--images", "70", "--input-size", "32", "--side-size", "16", "--epochs", "1"]
    where = ["--output", str(output), "--backbone", str(backbone), "--workers", "1"]
    return ["--task", "digits", *small, *where, "--seeds", "2", *more]


def test_the_components_add_up(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["components", *words(tmp_path, backbone, "--seeds", "1")]
    assert tables.main(arguments) == 0
    assert "| + preloading |" in capsys.readouterr().out
    rows = {row["row"]: row for row in json.loads((tmp_path / "components.json").read_text())}
    assert list(rows) == ["side_alone", "fusion", "asymmetric", "selection", "preloading"]
    memory = {name: row["memory"] for name, row in rows.items()}
    # As published: a smaller side input, fewer tokens and no frozen model each take less.
    assert (
        memory["fusion"]["peak"]
        > memory["asymmetric"]["peak"]
        > memory["selection"]["peak"]
        > memory["preloading"]["peak"]
    )
    # Preloading changes where features come from, and nothing else.
    assert rows["selection"]["aucs"] == pytest.approx(rows["preloading"]["aucs"], abs=0.02)
    with (tmp_path / "components.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["seed"] for line in lines] == ["0"] * 5
    assert (tmp_path / "components.svg").read_bytes().startswith(b"<?xml")
    # Again: nothing is trained twice.
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}
    tables.main(arguments)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("model.safetensors")}


def test_every_method_has_its_row() -> None:
    rows = list(TABLES["methods"](Options(Path("data"), Path("out"), "vit")))
    assert [row.method for row in rows] == [*PEER_METHODS, "fpt", "fpt_plus"]
    assert {row.method for row in rows if row.token_ratio is not None} == {"fpt", "fpt_plus"}


def test_peers_beside_fpt_plus(tmp_path: Path, backbone: Path) -> None:
    chosen = ["full", "bitfit", "fpt_plus"]
    tables.main(["methods", *words(tmp_path, backbone, "--seeds", "1", "--rows", *chosen)])
    rows = {row["row"]: row for row in json.loads((tmp_path / "methods.json").read_text())}
    memory = {name: row["memory"] for name, row in rows.items()}
    assert memory["full"]["share"] == 100 > memory["bitfit"]["share"] > 0
    assert [*sorted(memory, key=lambda name: -memory[name]["peak"])] == chosen
    text = (tmp_path / "methods.md").read_text()
    assert "| full fine-tuning | 100.00 % |" in text and "PME needs" not in text


def test_a_row_that_is_not_there_is_refused(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tables.main(["methods", *words(tmp_path, backbone, "--rows", "fpt_plus", "LoRA")])
    error = capsys.readouterr().err
    assert "no row LoRA" in error and "lora, " in error
    assert not (tmp_path / "runs").exists()


def test_a_row_of_other_settings_is_trained_anew(tmp_path: Path, backbone: Path) -> None:
    rows = ["--rows", "ratio_0.5"]
    tables.main(["ratios", *words(tmp_path, backbone, *rows, "--seeds", "2")])
    with (tmp_path / "ratios.csv").open() as file:
        assert [line["seed"] for line in csv.DictReader(file)] == ["0", "1"]
    best = tmp_path / "runs" / "ratio_0.5" / "seed-0" / "best" / "model.safetensors"
    before = best.stat().st_mtime_ns
    tables.main(["ratios", *words(tmp_path, backbone, *rows, "--seeds", "1", "--epochs", "2")])
    assert best.stat().st_mtime_ns != before


def test_a_row_takes_the_best_of_the_rates(tmp_path: Path, backbone: Path) -> None:
    """By the first seed's validation AUC; the other seeds and other tables follow."""
    rows = ["methods", *words(tmp_path, backbone, "--rows", "linear")]
    tables.main([*rows, "--search", "1e-9", "3e-2"])
    aucs = {
        rate: best_validation(tmp_path / "runs" / "linear" / f"seed-0-rate-{rate:g}")
        for rate in (1e-9, 3e-2)
    }
    best = min(aucs, key=lambda rate: (-aucs[rate], rate))
    assert json.loads((tmp_path / "rates.json").read_text()) == {"linear": best}
    (row,) = json.loads((tmp_path / "methods.json").read_text())
    assert row["learning_rate"] == best and len(row["aucs"]) == 2
    assert (
        f"Learning rates, chosen on validation images: linear probing {best:g}."
        in (tmp_path / "methods.md").read_text()
    )
    runs = tmp_path / "runs" / "linear"
    assert (runs / f"seed-1-rate-{best:g}").is_dir() and len(list(runs.iterdir())) == 3
    rates = tmp_path / "rates.json"
    rates.write_text(json.dumps({"linear": 0.5}))
    tables.main([*rows, "--seeds", "1", "--rates", str(rates)])
    (row,) = json.loads((tmp_path / "methods.json").read_text())
    assert row["learning_rate"] == 0.5


def predictions(scores: torch.Tensor, labels: torch.Tensor) -> Predictions:
    chances = torch.stack([1 - scores, scores], 1)
    return Predictions(tuple(map(str, range(len(labels)))), labels, chances.log(), chances)


def test_the_interval_holds_the_mean_and_narrows_with_images() -> None:
    variant, generator = Variant("x", "x", "fpt_plus", 0.2), torch.Generator().manual_seed(0)
    widths = []
    for count in (40, 640):
        labels = torch.arange(count) % 2
        runs = []
        for seed in range(3):
            noise = torch.rand(count, generator=generator)
            scores = (0.3 * labels + 0.7 * noise).clamp(0.01, 0.99)
            runs.append(Run(variant, seed, Path(), predictions(scores, labels), ("a", "b")))
        low, high = mean_interval(runs)
        assert 0.5 < low < high < 1
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_draws_keep_the_number_of_each_class() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    counts = draw(labels, 50, np.random.default_rng(0))
    for label, count in ((0, 3), (1, 2), (2, 1)):
        assert (counts[:, labels == label].sum(1) == count).all()


def test_peak_is_the_worse_of_step_and_frozen_pass() -> None:
    step = Account(10, 100, 40, 40, 80, 7, 0, 0, peak_bytes=300)
    assert Memory(step).peak == 300 and math.isclose(Memory(step).share, 10)
    assert Memory(step, frozen_bytes=1000, frozen_peak=100).peak == 1300
    assert Memory(step, frozen_bytes=1000, frozen_peak=500).peak == 1000 + 40 + 80 + 500


def picture(path: Path, serial: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(serial).integers(0, 255, (24, 24, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def make_messidor2(root: Path) -> None:
    lines = ["image_id,adjudicated_dr_grade,adjudicated_dme,adjudicated_gradable"]
    for i in range(50):
        picture(root / "IMAGES" / f"IM{i:04d}.JPG", i)
        lines.append(f"IM{i:04d}.jpg,{i % 5},0,1")
    lines.append("IM9999.jpg,,,0")
    (root / "messidor_data.csv").write_text("\n".join(lines))


def make_ddr(root: Path) -> None:
    for split in ("train", "valid", "test"):
        lines = []
        for i in range(12):
            picture(root / "DR_grading" / split / f"{split}-{i}.jpg", i)
            lines.append(f"{split}-{i}.jpg {i % 6}")
        (root / "DR_grading" / f"{split}.txt").write_text("\n".join(lines) + "\n")


def make_isic2016(root: Path) -> None:
    for part, labels in (("Training", ("benign", "malignant")), ("Test", ("0.0", "1.0"))):
        lines = []
        for i in range(20):
            picture(root / f"ISBI2016_ISIC_Part3_{part}_Data" / f"ISIC_{part}{i}.jpg", i)
            lines.append(f"ISIC_{part}{i},{labels[i % 2]}")
        (root / f"ISBI2016_ISIC_Part3_{part}_GroundTruth.csv").write_text("\n".join(lines))


def make_isic2018(root: Path) -> None:
    names = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
    for part in ("Training", "Validation", "Test"):
        lines = [",".join(("image", *names))]
        for i in range(14):
            picture(root / f"ISIC2018_Task3_{part}_Input" / f"ISIC_{part}{i}.jpg", i)
            lines.append(
                ",".join([f"ISIC_{part}{i}", *("1.0" if j == i % 7 else "0.0" for j in range(7))])
            )
        folder = root / f"ISIC2018_Task3_{part}_GroundTruth"
        folder.mkdir()
        (folder / f"{folder.name}.csv").write_text("\n".join(lines))


def make_ddsm(root: Path) -> None:
    for i in range(30):
        label = ("Normal", "Benign", "Cancer")[i % 3]
        for view in ("LEFT_CC", "LEFT_MLO"):
            picture(root / "MINI-DDSM" / label / f"{i:04d}" / f"{i}.{view}.jpg", i)
        picture(root / "MINI-DDSM" / label / f"{i:04d}" / f"{i}.LEFT_CC_Mask.jpg", i)


def make_cmmd(root: Path) -> None:
    lines = ["ID1,LeftRight,Age,number,abnormality,classification,subtype"]
    for i in range(20):
        for side in "LR":
            label = "Benign" if (i + (side == "R")) % 2 else "Malignant"
            lines.append(f"D1-{i:04d},{side},50,2,mass,{label},")
            path = root / "CMMD" / f"D1-{i:04d}" / "study" / "series" / f"1-{side}.dcm"
            path.parent.mkdir(parents=True, exist_ok=True)
            data = Dataset()
            data.file_meta = FileMetaDataset()
            data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
            data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
            data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            data.ImageLaterality = side
            data.Rows = data.Columns = 24
            data.BitsAllocated = data.BitsStored = 8
            data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 7, 0, 1
            data.PhotometricInterpretation = "MONOCHROME2"
            data.PixelData = np.random.default_rng(i).integers(0, 255, 576, np.uint8).tobytes()
            data.save_as(path, enforce_file_format=True)
    (root / "CMMD_clinicaldata_revision.csv").write_text("\n".join(lines))


def make_covid(root: Path) -> None:
    for i in range(30):
        label = ("covid", "normal", "virus")[i % 3]
        picture(root / "COVID_IEEE" / label / f"{i}.jpg", i)


def make_chncxr(root: Path) -> None:
    for i in range(30):
        picture(root / "ChinaSet_AllFiles" / "CXR_png" / f"CHNCXR_{i:04d}_{i % 2}.png", i)


DOWNLOADS = {
    "messidor2": (make_messidor2, 5, None),
    "ddr": (make_ddr, 5, (10, 10, 10)),
    "isic2016": (make_isic2016, 2, (18, 2, 20)),
    "isic2018": (make_isic2018, 7, (14, 14, 14)),
    "ddsm": (make_ddsm, 3, (42, 6, 12)),
    "cmmd": (make_cmmd, 2, (28, 4, 8)),
    "covid": (make_covid, 3, None),
    "chncxr": (make_chncxr, 2, None),
}


def test_every_published_data_set_has_a_reader() -> None:
    assert set(DOWNLOADS) == set(READERS) == set(preset_names())


@pytest.mark.parametrize("name", DOWNLOADS)
def test_a_download_becomes_a_list(name: str, tmp_path: Path) -> None:
    make, classes, counts = DOWNLOADS[name]
    make(tmp_path)
    images = load_image_set(write_list(name, tmp_path))
    assert len(images.classes) == classes
    splits = tuple(len(images.of_split(split)) for split in ("train", "val", "test"))
    if counts is not None:
        assert splits == counts
    else:
        assert sum(splits) in (30, 50) and abs(splits[0] - 0.7 * sum(splits)) <= classes
    if name in ("ddsm", "cmmd"):
        patients = {}
        for item in images.items:
            part = next(p for p in item.path.parts if p.startswith(("D1-", "00")))
            patients.setdefault(part, set()).add(item.split)
        assert all(len(found) == 1 for found in patients.values())


@pytest.mark.parametrize(
    ("name", "auc"),
    [
        ("chncxr", None),
        ("cmmd", None),
        ("covid", "99.70"),
        ("ddr", None),
        ("ddsm", "90.52"),
        ("isic2016", None),
        ("isic2018", "93.88"),
        ("messidor2", "84.95"),
    ],
)
def test_from_a_download_to_a_row_in_one_command(
    name: str, auc: str | None, tmp_path: Path, backbone: Path
) -> None:
    """With the published rate, and the published AUC beside ours where the papers give one."""
    download, output = tmp_path / "download", tmp_path / "out"
    DOWNLOADS[name][0](download)
    small = ["--input-size", "32", "--side-size", "16", "--epochs", "1", "--seeds", "1"]
    where = ["--data", str(download), "--output", str(output), "--backbone", str(backbone)]
    command = ["methods", "--published", name, *where, *small, "--rows", "fpt"]
    assert tables.main([*command, "--workers", "1"]) == 0
    text = (output / "methods.md").read_text()
    assert f"# Methods, {name}" in text and "| FPT |" in text
    assert f"learning rate {dataset_preset(name).learning_rate}" in text
    assert str(tmp_path) not in text
    assert ("published AUC" in text) == (auc is not None)
    assert auc is None or f"| {auc} |" in text


@pytest.mark.parametrize("name", DOWNLOADS)
def test_the_page_of_data_sets_has_what_is_published(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's figures are those of the presets and of the papers' tables, and its commands
    begin from the list that its first one writes."""
    page = (ROOT / "docs" / "datasets.md").read_text(encoding="utf-8")
    [row] = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    preset = dataset_preset(name)
    assert int(cells[2].split()[0]) == preset.num_classes == DOWNLOADS[name][1]
    assert float(cells[3]) == preset.learning_rate and preset.input_size == 512
    for cell, method in ((cells[4], "fpt"), (cells[5], "full_fine_tuning")):
        figure = published_auc(name, method)
        assert cell == "not given" if figure is None else float(cell) == figure
    folder = name.upper()
    words = f"python -m benchmarks.tables.published {name} {folder}"
    listed = f"--data {folder}/fpt-fast-{name}.csv"
    assert words in page and page.count(listed) == 2
    assert f"--normalization {name}\n" in page and f"--preset {name}\n" in page
    DOWNLOADS[name][0](tmp_path / folder)
    assert published.main([name, str(tmp_path / folder)]) == 0
    assert (tmp_path / folder / f"fpt-fast-{name}.csv").is_file()
    assert f"fpt-fast-{name}.csv" in capsys.readouterr().out
    assert published.main([name, str(tmp_path / "nowhere")]) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("messidor2", "no file messidor_data.csv"),
        ("covid", "no folder with images named covid, normal, virus"),
        ("chncxr", "no images of chncxr"),
    ],
)
def test_a_wrong_download_is_named(name: str, says: str, tmp_path: Path) -> None:
    picture(tmp_path / "other" / "x.png", 0)
    with pytest.raises(ValueError, match=says):
        write_list(name, tmp_path)


def test_a_label_without_its_image_is_named(tmp_path: Path) -> None:
    make_ddr(tmp_path)
    (tmp_path / "DR_grading" / "test" / "test-3.jpg").unlink()
    with pytest.raises(ValueError, match=r"no image test-3\.jpg, which the labels name"):
        write_list("ddr", tmp_path)


def test_published_tables_reach_the_document(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "evidence.md"
    page.write_text("# E\n<!-- ratios-x: begin -->\nold\n<!-- ratios-x: end -->\nkept\n")
    made = tmp_path / "out"
    made.mkdir()
    row = {"label": "20 %", "aucs": [0.8, 0.9], "interval": [0.7, 0.95]}
    rows = json.dumps([row | {"memory": {"peak": 3e6, "share": 1.8}}])
    for ending, text in (("md", "# Title\n\nnew\n"), ("csv", "a"), ("json", rows)):
        (made / f"ratios.{ending}").write_text(text)
    assert publish(made, "x", tmp_path) == ["ratios-x"]
    text = page.read_text()
    assert "old" not in text and "new\n\n![AUC against memory](figures/ratios-x.svg)" in text
    assert text.endswith("<!-- ratios-x: end -->\nkept\n") and "# Title" not in text
    assert (tmp_path / "benchmarks" / "results" / "tables" / "ratios-x.csv").read_text() == "a"
    plot = (tmp_path / "docs" / "figures" / "ratios-x.svg").read_text()
    assert "Token ratios, x" in plot and "20 %" in plot


def test_the_evidence_is_that_of_the_committed_results() -> None:
    text = (ROOT / "docs" / "evidence.md").read_text()
    files = sorted((ROOT / "benchmarks" / "results" / "tables").glob("*.json"))
    tables = {"components-digits", "ratios-digits", "methods-digits"}
    assert {path.stem for path in files} >= tables
    for path in files:
        block = text.partition(f"<!-- {path.stem}: begin -->")[2]
        block = block.partition(f"<!-- {path.stem}: end -->")[0]
        for row in json.loads(path.read_text()):
            auc = 100 * sum(row["aucs"]) / len(row["aucs"])
            line = next(
                line for line in block.splitlines() if line.startswith(f"| {row['label']} |")
            )
            assert f"| {auc:.2f} |" in line
