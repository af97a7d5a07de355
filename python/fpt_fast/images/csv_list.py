"""CSV lists of images: path, label and split, checked row by row."""

import csv
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from fpt_fast.images.values import parse_value, strata_of
from fpt_fast.records import SPLITS, UNLABELLED, Split
from fpt_fast.words import what_was_meant

_DELIMITERS = ",;\t"
_LISTED = 20
_FINDINGS = {"1": 1, "true": 1, "yes": 1, "0": 0, "false": 0, "no": 0, "-1": UNLABELLED}

_T = TypeVar("_T")


class ImageSetError(ValueError):
    """A data set that cannot be used; says what is wrong, where, and what to do."""


class Row(NamedTuple):
    """One image before labels are numbered: key, class name, split and patient where given."""

    key: str
    label: str
    split: Split | None
    patient: str | None = None
    findings: tuple[int, ...] = ()
    value: float | None = None


class Columns(NamedTuple):
    """Names of a list's columns; that of the split may be absent unless ``split_required``.

    With ``findings`` there is no ``label``: each is a column of 1 and 0, and ``blank`` is what an
    empty cell means.  With ``value`` there is none either: it is a column of numbers, and rows have
    the fifth that theirs is in for a label.
    """

    path: str = "path"
    label: str = "label"
    split: str = "split"
    patient: str | None = None
    findings: tuple[str, ...] = ()
    blank: int = UNLABELLED
    value: str | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns that tell what an image shows."""
        return self.findings or ((self.label,) if self.value is None else (self.value,))

    @property
    def wanted(self) -> dict[str, str]:
        """The columns that must be there, and the setting that names each."""
        kind = "label_columns" if self.findings else "label_column"
        wanted = dict.fromkeys(self.labels, kind if self.value is None else "value_column")
        wanted |= {self.path: "path_column"}
        wanted |= {self.split: "split_column"} if self.split_required else {}
        return wanted | ({} if self.patient is None else {self.patient: "patient_column"})

    @property
    def split_required(self) -> bool:
        """Whether the split's column was asked for by name."""
        return self.split != "split"


class _RowError(ValueError):
    """What is wrong with one row."""


def read_labelled_rows(path: Path, columns: Columns) -> tuple[list[Row], tuple[str, ...]]:
    """Read the rows of a list, and its class names in label order.

    Raises ``ImageSetError`` naming all bad rows by their line numbers (20 at most).
    """
    lines: dict[str, int] = {}

    def parse(cells: dict[str, str], line: int) -> Row:
        key = _key_inside(path.parent, cells[columns.path])
        if key in lines:
            raise _RowError(f"{key} is already in row {lines[key]}")
        lines[key] = line
        label = "" if columns.findings else cells[columns.labels[0]]
        if not label and not columns.findings:
            raise _RowError(f"{key} has no {columns.labels[0]}")
        value = None
        if columns.value is not None:
            try:
                value = parse_value(columns.value, label)
            except ValueError as error:
                raise _RowError(str(error)) from None
        findings = tuple(_parse_finding(name, cells[name], columns) for name in columns.findings)
        patient = None if columns.patient is None else cells[columns.patient]
        if patient == "":
            raise _RowError(f"{key} has no {columns.patient}")
        return Row(key, label, _parse_split(cells.get(columns.split)), patient, findings, value)

    rows = _parse_rows(path, columns.wanted, parse)
    if columns.findings:
        return rows, columns.findings
    if columns.value is not None:
        strata = strata_of([row.value for row in rows if row.value is not None])
        named = zip(rows, strata, strict=True)
        return [row._replace(label=stratum) for row, stratum in named], (columns.value,)
    labels = {row.label for row in rows}
    if all(re.fullmatch(r"[+-]?\d+", label) for label in labels):
        # "01" and "1" are one class.
        rows = [row._replace(label=str(int(row.label))) for row in rows]
        return rows, tuple(map(str, sorted({int(row.label) for row in rows})))
    return rows, tuple(sorted(labels))


def read_paths(path: Path, path_column: str) -> list[Path]:
    """Read the images of a list, without labels; errors as in ``read_labelled_rows``."""

    def parse(cells: dict[str, str], line: int) -> Path:
        return path.parent / _key_inside(path.parent, cells[path_column])

    return _parse_rows(path, {path_column: ""}, parse)


def _parse_rows(
    path: Path, wanted: Mapping[str, str], parse: Callable[[dict[str, str], int], _T]
) -> list[_T]:
    parsed = []
    problems = []
    for line, cells in _read_cells(path, wanted):
        try:
            parsed.append(parse(cells, line))
        except _RowError as error:
            problems.append(f"row {line}: {error}")
    if problems:
        shown = problems[:_LISTED]
        if len(problems) > _LISTED:
            shown.append(f"... and {len(problems) - _LISTED} more")
        raise ImageSetError(f"{path} has bad rows:\n  " + "\n  ".join(shown))
    if not parsed:
        raise ImageSetError(f"{path} lists no images")
    return parsed


def _read_cells(path: Path, wanted: Mapping[str, str]) -> list[tuple[int, dict[str, str]]]:
    """Return (line number, cells by column) of each row that is not blank."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ImageSetError(f"{path} is not a CSV list in UTF-8") from None
    except OSError as error:
        raise ImageSetError(f"{path} cannot be read: {error.strerror}") from None
    header = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=header.count)
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
    rows = []
    try:
        names = [name.strip() for name in next(reader, [])]
        missing = {name: kind for name, kind in wanted.items() if name not in names}
        if missing:
            raise ImageSetError(f"{path} {_missing_columns(missing, names)}")
        repeated = [name for name in wanted if names.count(name) > 1]
        if repeated:
            raise ImageSetError(f"{path} has the column {repeated[0]!r} more than once")
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(names):
                raise ImageSetError(
                    f"{path}, row {reader.line_num}: expected {len(names)} cells, got {len(cells)}"
                )
            stripped = (cell.strip() for cell in cells)
            rows.append((reader.line_num, dict(zip(names, stripped, strict=True))))
    except csv.Error as error:
        raise ImageSetError(f"{path}, row {reader.line_num}: {error}") from None
    return rows


def _missing_columns(missing: Mapping[str, str], names: Sequence[str]) -> str:
    """Which columns were asked for, by what, which there are, and which may have been meant."""
    asked, meant = [], []
    for name, kind in missing.items():
        asked.append(repr(name) + (f" (--{kind.replace('_', '-')})" if kind else ""))
        meant += what_was_meant(name, names)
    said = [
        f"must have the column {' and '.join(asked)}, got "
        f"{', '.join(map(repr, names)) or 'an empty file'}",
        *meant,
    ]
    if "label_column" in missing.values():
        said.append(
            "what images show may also be several findings, --label-columns, or a number, "
            "--value-column"
        )
    return "; ".join(said)


def _key_inside(root: Path, written: str) -> str:
    """Turn a path as written in a list into a key: relative to ``root``, POSIX, normalised."""
    if not written:
        raise _RowError("no path")
    # Lexically: a link inside the folder that leads out of it is the user's own choice.
    root = Path(os.path.abspath(root))  # noqa: PTH100
    full = Path(os.path.normpath(root / written))
    if Path(written).is_absolute() and not full.is_relative_to(root):
        root, full = root.resolve(), full.resolve()
    if not full.is_relative_to(root):
        raise _RowError(f"{written} is outside {root}")
    if not full.is_file():
        raise _RowError(f"{written} is a directory" if full.is_dir() else f"no file {written}")
    return full.relative_to(root).as_posix()


def _parse_finding(name: str, written: str, columns: Columns) -> int:
    """1, 0, or ``UNLABELLED`` for -1 and for an empty cell unless that is told otherwise."""
    if written == "":
        return columns.blank
    value = _FINDINGS.get(written.lower().removesuffix(".0"))
    if value is None:
        raise _RowError(f"{name} must be 1, 0, -1 (unknown) or empty, got {written!r}")
    return value


def _parse_split(written: str | None) -> Split | None:
    if written is None:
        return None
    for split in SPLITS:
        if written.lower() == split:
            return split
    raise _RowError(f"split must be one of {', '.join(SPLITS)}, got {written!r}")
