"""The eight public data sets of the papers: from the folder of a download to a CSV list.

Files are found by name at any depth, so that it does not matter how an archive was unpacked.
Splits are the official ones where the download has them (DDR, ISIC 2016, ISIC 2018); DDSM and
CMMD are split by patient; the others are split by ``train`` itself, 70/10/20, by class.  The
authors' own splits are not public, so that figures on the latter five are comparable only roughly.

Where each comes from: Messidor-2 (ADCIS; grades ``messidor_data.csv`` of Google, on Kaggle), DDR
(github.com/nkicsl/DDR-dataset, DR_grading), ISIC 2016 part 3 and ISIC 2018 task 3 (challenge
pages), DDSM (the JPEG or PNG release "mini-DDSM"), CMMD (TCIA; its clinical table saved as CSV),
COVID (Kaggle, "COVID CXR Image Dataset": covid, normal, virus), CHNCXR (Shenzhen set of the NLM).

``python -m benchmarks.tables.published ddr DDR`` writes the list of one; docs/datasets.md.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.account import NAMES, PUBLISHED
from fpt_fast.images import EXTENSIONS
from fpt_fast.images.splits import assign_splits

# Path, class, and split where one is settled.
Row = tuple[Path, str, str | None]
RATIOS = (0.7, 0.1, 0.2)


def write_list(name: str, folder: Path) -> Path:
    """Write ``fpt-fast-NAME.csv`` (path, label[, split]) into the download's ``folder``.

    Raises ValueError where a file or class of that download is missing, naming what was looked for.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ValueError(f"--data must be the folder of the download of {name}, got {folder}")
    rows = sorted(READERS[name](folder))
    if not rows:
        raise ValueError(f"{folder} has no images of {name}; see benchmarks/tables/published.py")
    path = folder / f"fpt-fast-{name}.csv"
    has_splits = all(split is not None for _, _, split in rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(["path", "label", "split"] if has_splits else ["path", "label"])
        for image, label, split in rows:
            cells = [image.relative_to(folder).as_posix(), label]
            out.writerow([*cells, split] if has_splits else cells)
    return path


def published_auc(name: str, row: str) -> float | None:
    """The AUC in percent that the papers give for that data set and method, where they do."""
    table = json.loads(PUBLISHED.read_text(encoding="utf-8"))["table1"]
    figures = table.get(NAMES.get(row, row))
    if figures is None or name not in table["columns"]:
        return None
    return float(figures[table["columns"].index(name)])


def messidor2(folder: Path) -> Iterator[Row]:
    """Adjudicated grades 0-4; images that are not gradable have none."""
    images = Images(folder)
    for row in table(folder, "messidor_data.csv"):
        grade = row["adjudicated_dr_grade"]
        if grade not in ("", "None") and row.get("adjudicated_gradable", "1") != "0":
            yield images[row["image_id"]], str(int(float(grade))), None


def ddr(folder: Path) -> Iterator[Row]:
    """Grades 0-4 of the official splits; grade 5 is "ungradable" and left out."""
    images = Images(folder)
    for name, split in (("train", "train"), ("valid", "val"), ("test", "test")):
        for line in find(folder, f"{name}.txt").read_text().splitlines():
            image, _, grade = line.strip().rpartition(" ")
            if image and grade != "5":
                yield images[image], grade, split


def isic2016(folder: Path) -> Iterator[Row]:
    """Benign or malignant; val is a tenth of each class of the official training images."""
    images = Images(folder)
    named = {"0.0": "benign", "1.0": "malignant", "0": "benign", "1": "malignant"}
    training: dict[str, list[str]] = {"benign": [], "malignant": []}
    for name, label in headless(folder, "ISBI2016_ISIC_Part3_Training_GroundTruth.csv"):
        training[named.get(label, label)].append(name)
    splits = assign_splits(training, (0.9, 0.1, 0.0), 0)
    for label, names in training.items():
        yield from ((images[name], label, splits[name]) for name in names)
    for name, label in headless(folder, "ISBI2016_ISIC_Part3_Test_GroundTruth.csv"):
        yield images[name], named.get(label, label), "test"


def isic2018(folder: Path) -> Iterator[Row]:
    """Seven classes of task 3, official splits."""
    images = Images(folder)
    for name, split in (("Training", "train"), ("Validation", "val"), ("Test", "test")):
        for row in table(folder, f"ISIC2018_Task3_{name}_GroundTruth.csv"):
            label = max((key for key in row if key != "image"), key=lambda key: float(row[key]))
            yield images[row["image"]], label, split


def ddsm(folder: Path) -> Iterator[Row]:
    """Normal, benign or cancer by folder; split by the folder below it, which is a patient."""
    return split_by_patient(by_folder(folder, ("normal", "benign", "cancer"), has_patients=True))


def cmmd(folder: Path) -> Iterator[Row]:
    """Benign or malignant by breast: DICOM files below a folder named as the patient."""
    from pydicom import dcmread

    sides = {
        (row["ID1"], row["LeftRight"].strip().upper()[:1]): row["classification"].lower()
        for row in table(folder, "CMMD_clinicaldata_revision.csv")
    }
    patients = {patient for patient, _ in sides}
    found = []
    for path in sorted(folder.rglob("*.dcm")):
        patient = next((part for part in path.parts if part in patients), None)
        tags = dcmread(path, stop_before_pixels=True)
        side = str(tags.get("ImageLaterality") or tags.get("Laterality") or "").upper()
        label = None if patient is None else sides.get((patient, side))
        if patient is not None and label is not None:
            found.append((path, label, patient))
    return split_by_patient(found)


def covid(folder: Path) -> Iterator[Row]:
    """COVID-19, normal or other viral pneumonia, by folder."""
    for path, label, _ in by_folder(folder, ("covid", "normal", "virus")):
        yield path, label, None


def chncxr(folder: Path) -> Iterator[Row]:
    """Normal or tuberculosis: the last digit of a name, CHNCXR_0001_0.png."""
    for path in sorted(folder.rglob("CHNCXR_*_[01].png")):
        if "mask" not in path.as_posix().lower():
            yield path, "normal" if path.stem.endswith("0") else "tuberculosis", None


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "chncxr": chncxr,
    "cmmd": cmmd,
    "covid": covid,
    "ddr": ddr,
    "ddsm": ddsm,
    "isic2016": isic2016,
    "isic2018": isic2018,
    "messidor2": messidor2,
}


class Images(Mapping[str, Path]):
    """Images below a folder by name, whatever the case and the ending."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._paths = {path.stem.lower(): path for path in images_below(folder)}

    def __getitem__(self, name: str) -> Path:
        ending = Path(name).suffix.lower()
        stem = Path(name).stem if ending in (*EXTENSIONS, ".dcm") else name
        try:
            return self._paths[stem.lower()]
        except KeyError:
            raise ValueError(
                f"{self._folder} has no image {name}, which the labels name; is the download whole?"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def images_below(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
            yield path


def find(folder: Path, name: str) -> Path:
    """The file of that name nearest to the top."""
    found = sorted(folder.rglob(name), key=lambda path: (len(path.parts), path))
    found = [path for path in found if path.is_file()]
    if not found:
        raise ValueError(f"{folder} has no file {name}; it belongs to the download")
    return found[0]


def table(folder: Path, name: str) -> list[dict[str, str]]:
    """Rows of a CSV with a head."""
    with find(folder, name).open(newline="", encoding="utf-8-sig") as file:
        text = file.read()
    delimiter = ";" if ";" in text.partition("\n")[0] else ","
    return list(csv.DictReader(text.splitlines(), delimiter=delimiter))


def headless(folder: Path, name: str) -> list[tuple[str, str]]:
    """Rows of a CSV of two columns without a head."""
    with find(folder, name).open(newline="", encoding="utf-8-sig") as file:
        return [(row[0].strip(), row[1].strip()) for row in csv.reader(file) if len(row) > 1]


def by_folder(
    folder: Path, classes: tuple[str, ...], *, has_patients: bool = False
) -> list[tuple[Path, str, str]]:
    """Images with the class that a folder above them is named after, and the folder below that."""
    found = []
    for path in images_below(folder):
        parts = path.relative_to(folder).parts[:-1]
        named = [i for i, part in enumerate(parts) if part.lower() in classes]
        if named and "mask" not in path.name.lower():
            below = parts[named[-1] + 1] if has_patients and named[-1] + 1 < len(parts) else ""
            label = parts[named[-1]].lower()
            found.append((path, label, f"{label}/{below or path.stem}"))
    missing = sorted(set(classes) - {label for _, label, _ in found})
    if missing:
        raise ValueError(f"{folder} has no folder with images named {', '.join(missing)}")
    return found


def split_by_patient(rows: list[tuple[Path, str, str]]) -> Iterator[Row]:
    """Rows of path, class, patient: no patient in two splits; a patient of several classes counts
    for the last of them by name."""
    label_of: dict[str, str] = {}
    for _, label, patient in rows:
        label_of[patient] = max(label, label_of.get(patient, ""))
    patients: dict[str, list[str]] = {}
    for patient, label in label_of.items():
        patients.setdefault(label, []).append(patient)
    splits = assign_splits(patients, RATIOS, 0)
    for path, label, patient in rows:
        yield path, label, splits[patient]


def main(arguments: list[str] | None = None) -> int:
    """Write the list of one download; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables.published")
    parser.add_argument("name", choices=sorted(READERS))
    parser.add_argument("folder", type=Path, help="of the download")
    given = parser.parse_args(arguments)
    try:
        path = write_list(given.name, given.folder)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    with path.open(encoding="utf-8") as file:
        count = sum(1 for _ in file) - 1
    print(f"{count} images: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
