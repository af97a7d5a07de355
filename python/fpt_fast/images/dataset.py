"""Data sets: a folder of splits, a folder of classes, or a CSV list, as one ``ImageSet``."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fpt_fast.images.csv_list import (
    Columns,
    ImageSetError,
    Row,
    read_labelled_rows,
    read_paths,
)
from fpt_fast.images.dicom import EXTENSIONS as DICOM_EXTENSIONS
from fpt_fast.images.dicom import MAGIC_BYTES, has_dicom_name, is_dicom
from fpt_fast.images.patients import (
    complete_splits,
    fold_splits,
    parse_fold,
    require_whole_patients,
    with_patients,
)
from fpt_fast.images.splits import Ratios, check_ratios
from fpt_fast.records import SPLITS, UNLABELLED, ImageItem, ImageSet, Split, Task

log = logging.getLogger("fpt_fast")

EXTENSIONS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", *DICOM_EXTENSIONS)

# Names that people give to splits, and that would make a nonsensical class.
_LIKE_A_SPLIT = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


def load_image_set(
    data: str | Path,
    *,
    ratios: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
    patient_column: str | None = None,
    patient_pattern: str | None = None,
    label_columns: Sequence[str] = (),
    value_column: str | None = None,
    blank_findings: Literal["unknown", "absent"] = "unknown",
    fold: str | None = None,
    class_order: Sequence[str] = (),
) -> ImageSet:
    """List the images of a data set with their classes and splits; nothing is decoded.

    ``data`` is one of

    - a directory with ``train/<class>/...``, and ``val`` and ``test`` likewise if it has them;
    - a directory ``<class>/...`` without splits;
    - a CSV file (comma, semicolon or tab) with the columns path, label and, if it has it, split;
      paths are relative to the file's folder, or absolute inside it.

    Classes of directories are in order of name, as in torchvision's ImageFolder; labels of a list
    in numerical order if all are integers, else by name; ``class_order`` names all of them in
    another order, which matters where they are grades.  Folders are searched to any depth;
    hidden files are passed over, and so are files of other extensions than ``EXTENSIONS`` (but for
    DICOM files without one), which are counted in a log message.

    Without splits, each class is divided by ``ratios`` (train, val, test) and ``seed``.  Where
    there is a train split but no val, val is taken from train in the proportion of the ratios;
    where there is no test, test stays empty.  Both are logged.

    ``patient_column`` of a list, or what ``patient_pattern`` (a regular expression with one group)
    finds in an image's key, names its patient.  Then patients are divided, not images, with the
    classes as near to the ratios as they allow, and given splits that a patient stands on two
    sides of are an error.

    ``label_columns`` of a list are findings, of which an image may have several: cells of 1, 0, or
    -1 (unknown); an empty one is unknown too, or 0 with ``blank_findings="absent"``.

    ``value_column`` of a list is a number per image; it has no class, and splits have their shares
    of low and high numbers.

    ``fold`` (``2/5``) tests on one of several equal parts of all images, whatever splits the data
    brings, and takes val from the rest.

    Raises ``ImageSetError`` naming what is wrong: an empty class, a single class, a class that
    train lacks, missing or repeated files, paths outside the folder, unknown split names.
    """
    try:
        shares = check_ratios(ratios)
    except ValueError as error:
        raise ImageSetError(str(error)) from None
    _check_columns(data, patient_column, label_columns, value_column, class_order)
    root = Path(os.path.abspath(data))  # noqa: PTH100 - resolve() would follow symbolic links
    if root.is_dir():
        splits = [split for split in SPLITS if (root / split).is_dir()]
        rows = _list_splits(root, splits) if "train" in splits else _list_classes(root)
        classes = tuple(sorted({row.label for row in rows}))
    elif root.is_file():
        columns = Columns(
            path_column,
            label_column,
            split_column,
            patient_column,
            tuple(label_columns),
            0 if blank_findings == "absent" else UNLABELLED,
            value_column,
        )
        rows, classes = read_labelled_rows(root, columns)
        root = root.parent
    else:
        raise ImageSetError(f"no such file or directory: {data}")
    if patient_pattern is not None:
        rows = with_patients(rows, patient_pattern)
    return _make_set(root, rows, _ordered(classes, class_order), shares, seed, fold)


def _ordered(classes: Sequence[str], order: Sequence[str]) -> tuple[str, ...]:
    """``classes`` in the ``order`` given, if any, which must name each of them once."""
    if order and sorted(order) != sorted(classes):
        raise ImageSetError(
            f"class_order must name each class once: {', '.join(classes)}; got {', '.join(order)}"
        )
    return tuple(order or classes)


def _check_columns(
    data: str | Path,
    patient: str | None,
    findings: Sequence[str],
    value: str | None,
    order: Sequence[str],
) -> None:
    """Raise ``ImageSetError`` for columns that do not go together, or of what has none."""
    if findings and value:
        raise ImageSetError("an image has findings or a value: give label_columns or value_column")
    if order and (findings or value):
        raise ImageSetError("class_order is for classes, and not for findings or numbers")
    if Path(data).is_dir() and (patient or findings or value):
        raise ImageSetError(
            "patient_column, label_columns and value_column need a CSV list, folders have one "
            "class each (and take a patient_pattern)"
        )


def list_images(paths: Sequence[str | Path], *, path_column: str = "path") -> list[Path]:
    """List image files, unlabelled: each of ``paths`` is an image, a folder, or a CSV list.

    Folders are searched to any depth, in order of name; a path that appears twice is listed once.
    Raises ``ImageSetError`` for a path that does not exist or gives no images.
    """
    found: dict[Path, None] = {}
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = _find_images(path)[0]
            if not inside:
                raise ImageSetError(f"no images in {path}; known are {', '.join(EXTENSIONS)}")
        elif path.suffix.lower() in (".csv", ".tsv"):
            inside = read_paths(path, path_column)
        elif path.is_file():
            inside = [path]
        else:
            raise ImageSetError(f"no such file or directory: {path}")
        found.update(dict.fromkeys(inside))
    return list(found)


def _make_set(
    root: Path,
    rows: Sequence[Row],
    classes: tuple[str, ...],
    ratios: Ratios,
    seed: int,
    fold: str | None,
) -> ImageSet:
    several = bool(rows and rows[0].findings)
    valued = bool(rows and rows[0].value is not None)
    if len(classes) < 2 and not several and not valued:
        raise ImageSetError(
            f"{root} has one class only ({', '.join(classes)}); a classifier needs at least two"
        )
    if fold is None:
        splits = complete_splits(rows, ratios, seed)
    else:
        splits = fold_splits(rows, parse_fold(fold), ratios, seed)
    require_whole_patients(rows, splits)
    in_train = [row for row in rows if splits[row.key] == "train"]
    trained = {row.label for row in in_train}
    trained |= {classes[f] for row in in_train for f, has in enumerate(row.findings) if has == 1}
    if valued and not in_train:
        raise ImageSetError(f"{root} has no images in the train split")
    for name in () if valued else classes:
        if name not in trained:
            kind = "finding" if several else "class"
            raise ImageSetError(
                f"{kind} {name!r} of {root} has no images in the train split; a {kind} that is "
                "only in val or test cannot be learned"
            )
    labels = {name: label for label, name in enumerate(classes)}
    items = tuple(
        ImageItem(
            row.key,
            root / row.key,
            UNLABELLED if several or valued else labels[row.label],
            splits[row.key],
            patient=row.patient,
            findings=row.findings,
            value=row.value,
        )
        for row in sorted(rows, key=lambda row: row.key)
    )
    counts = {split: sum(item.split == split for item in items) for split in SPLITS}
    log.debug("%s: %d classes, images by split %s", root, len(classes), counts)
    task: Task = "regression" if valued else "multilabel" if several else "multiclass"
    return ImageSet(root, classes, items, task)


def _list_splits(root: Path, splits: Sequence[Split]) -> list[Row]:
    """Rows of ``root/<split>/<class>/...``."""
    others = [folder.name for folder in _folders(root) if folder.name not in splits]
    misnamed = [name for name in others if name.lower() in _LIKE_A_SPLIT]
    if misnamed:
        raise ImageSetError(
            f"{root} has folders {', '.join(misnamed)} beside {', '.join(splits)}; splits are "
            f"called {', '.join(SPLITS)}: rename or remove them"
        )
    if others:
        log.warning("%s: folders that are no splits are ignored: %s", root, ", ".join(others))
    rows = []
    for split in splits:
        rows += _list_class_folders(root, root / split, split)
    return rows


def _list_classes(root: Path) -> list[Row]:
    """Rows of ``root/<class>/...``, without splits."""
    for folder in _folders(root):
        split = _LIKE_A_SPLIT.get(folder.name.lower())
        if split is not None:
            raise ImageSetError(
                f"{root} has a folder {folder.name!r} but no folder 'train'; if it holds a split, "
                f"call it {split!r} and have a train split, else rename it"
            )
    return _list_class_folders(root, root, None)


def _list_class_folders(root: Path, parent: Path, split: Split | None) -> list[Row]:
    folders = _folders(parent)
    if not folders:
        raise ImageSetError(
            f"{parent} has no class folders; expected train/<class>/<image> (and val, test), "
            "<class>/<image>, or a CSV list"
        )
    rows = []
    ignored = 0
    for folder in folders:
        paths, others = _find_images(folder)
        ignored += others
        if not paths:
            raise ImageSetError(
                f"class folder {folder} has no images ({others} other files); add images "
                f"({', '.join(EXTENSIONS)}) or remove the folder"
            )
        rows += [Row(path.relative_to(root).as_posix(), folder.name, split) for path in paths]
    loose = sum(path.is_file() and not path.name.startswith(".") for path in parent.iterdir())
    if ignored:
        log.warning("%s: %d files that are not images are ignored", parent, ignored)
    if loose:
        log.warning("%s: %d files outside the class folders are ignored", parent, loose)
    for row in rows:
        _check_name(root, row.key)
    return rows


def _folders(parent: Path) -> list[Path]:
    return sorted(
        path for path in parent.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def _find_images(folder: Path) -> tuple[list[Path], int]:
    """Image files at any depth below ``folder``, sorted, and how many other files there are.

    Linked folders are followed, but not back into a folder that they are in.
    """
    images: list[Path] = []
    others = 0
    pending = [(folder, frozenset({folder.resolve()}))]
    while pending:
        current, above = pending.pop()
        for path in current.iterdir():
            if path.name.startswith("."):
                continue
            if path.is_dir():
                real = path.resolve()
                if real not in above:
                    pending.append((path, above | {real}))
            elif path.suffix.lower() in EXTENSIONS or _is_bare_dicom(path):
                images.append(path)
            else:
                others += 1
    return sorted(images, key=lambda path: path.as_posix()), others


def _is_bare_dicom(path: Path) -> bool:
    """A DICOM file whose name has no ending, or a number for one, as archives export them."""
    if not has_dicom_name(path):
        return False
    try:
        with path.open("rb") as file:
            return is_dicom(file.read(MAGIC_BYTES), "")
    except OSError:
        return False


def _check_name(root: Path, key: str) -> None:
    try:
        key.encode()
    except UnicodeEncodeError:
        raise ImageSetError(
            f"the name of {root / key!r} is not valid UTF-8; rename the file"
        ) from None
