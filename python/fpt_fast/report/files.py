"""The files of a run folder that other programs read: YAML, JSON and CSV."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fpt_fast.files import write_atomically
from fpt_fast.metrics import Metrics, predicted_classes
from fpt_fast.records import UNLABELLED, Predictions, TrainingHistory
from fpt_fast.trust import Assessment

_LABEL = "label_"
_VALUE = "value_"
_KINDS = (_LABEL, "predicted_", "probability_")


def write_run_files(
    run_dir: str | Path,
    *,
    predictions: Predictions,
    classes: Sequence[str],
    assessment: Assessment,
    history: TrainingHistory | None = None,
    config: Mapping[str, Any] | None = None,
    suffix: str = "",
) -> tuple[Path, ...]:
    """Write ``metrics.json`` and ``predictions.csv``, and what else is given, into ``run_dir``.

    ``history`` becomes ``history.csv``, ``config`` (nested plain values, paths and tuples)
    ``config.yaml``.  ``suffix`` goes before the ending, as in ``metrics-val.json``.  Each file
    is replaced whole.  Returns the paths.  Raises ``ValueError`` where ``classes`` do not fit the
    predictions.
    """
    check_classes(classes, predictions, assessment.metrics)
    folder = Path(run_dir)
    written = [folder / f"metrics{suffix}.json", folder / f"predictions{suffix}.csv"]
    _write_metrics(written[0], assessment, classes, history)
    write_predictions(written[1], predictions, classes)
    if history is not None:
        written.append(folder / f"history{suffix}.csv")
        _write_history(written[-1], history)
    if config is not None:
        written.append(folder / f"config{suffix}.yaml")
        _write_yaml(written[-1], config)
    return tuple(written)


def check_classes(classes: Sequence[str], predictions: Predictions, metrics: Metrics) -> None:
    """Raise ``ValueError`` unless there is a name for every class of predictions and metrics."""
    if predictions.labels.is_floating_point():
        if len(classes) != 1 or predictions.logits.shape[1] != 1:
            raise ValueError(
                f"a number per image has one name, got {len(classes)} names and logits "
                f"{tuple(predictions.logits.shape)}"
            )
        return
    outputs = len(classes) if predictions.probabilities is not None else 1
    if predictions.logits.shape[1] != outputs or len(metrics.per_class) != len(classes):
        raise ValueError(
            f"classes must name each of {len(metrics.per_class)} classes that predictions and "
            f"metrics know, got {len(classes)} names and logits "
            f"{tuple(predictions.logits.shape)}"
        )


def _write_metrics(
    path: Path, assessment: Assessment, classes: Sequence[str], history: TrainingHistory | None
) -> None:
    values = assessment.to_json()
    values["classes"] = list(classes)
    values["missing_classes"] = [classes[label] for label in assessment.metrics.missing_classes]
    if history is not None:
        values["monitor"] = history.monitor
        values["best_epoch"] = history.best_epoch
        values["best_value"] = history.best_value
    with write_atomically(path) as file:
        json.dump(values, file, allow_nan=False, ensure_ascii=False, indent=2)
        file.write("\n")


def _write_history(path: Path, history: TrainingHistory) -> None:
    """One row an epoch; an empty cell where a metric was not computed or is not a number."""
    names = list(dict.fromkeys(name for record in history.epochs for name in record.val))
    with write_atomically(path) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["epoch", "loss", "learning_rate", "seconds", *(f"val_{name}" for name in names)]
        )
        for record in history.epochs:
            val = [record.val.get(name, math.nan) for name in names]
            rows.writerow(
                [
                    record.epoch,
                    record.loss,
                    record.learning_rate,
                    f"{record.seconds:.3f}",
                    *("" if math.isnan(value) else value for value in val),
                ]
            )


def write_predictions(path: Path, predictions: Predictions, classes: Sequence[str]) -> None:
    """One row an image: key, label and prediction by name, probabilities or the predicted grade.

    Of several findings per image: for each finding a label (empty where unknown), whether it is
    called, and its probability.  Of a number per image: what it is (empty where unknown), and what
    is predicted.
    """
    if predictions.labels.dim() == 2:
        _write_findings(path, predictions, classes)
        return
    if predictions.labels.is_floating_point():
        _write_values(path, predictions, classes[0])
        return
    predicted = predicted_classes(predictions, len(classes)).tolist()
    if predictions.probabilities is None:
        columns, numbers = ["grade"], predictions.logits
    else:
        columns = [f"probability_{name}" for name in classes]
        numbers = predictions.probabilities
    with write_atomically(path) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["key", "label", "predicted", *columns])
        for key, label, guess, values in zip(
            predictions.keys,
            predictions.labels.tolist(),
            predicted,
            numbers.tolist(),
            strict=True,
        ):
            name = "" if label == UNLABELLED else classes[label]
            # Nine digits read back as the same f32.
            rows.writerow([key, name, classes[guess], *(f"{value:.9g}" for value in values)])


def read_predictions(
    path: Path, classes: Sequence[str] | None = None, cuts: tuple[float, ...] | None = None
) -> tuple[Predictions, tuple[str, ...]]:
    """What ``write_predictions`` wrote, and the class names.

    Logits are the logarithms of the probabilities, which differ from the model's by a number for
    each image that no probability depends on.  Predicted grades need the names of ``classes`` in
    their order, which the file does not have, and ``cuts`` between them (``grade_cuts`` of
    metrics.json).  Raises ``ValueError`` for another kind of file.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            header, *rows = csv.reader(file)
    except OSError as error:
        raise ValueError(f"cannot read predictions from {path}: {error.strerror}") from error
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} is empty, or no CSV file: {error}") from error
    if len(header) == 3 and header[1:] == [_LABEL + _name(header[1]), _VALUE + _name(header[1])]:
        return _read_values(path, rows, _name(header[1]))
    if len(header) > 1 and header[1].startswith(_LABEL):
        return _read_findings(path, header, rows)
    columns = header[3:]
    if header[:3] != ["key", "label", "predicted"] or not columns or not rows:
        raise ValueError(f"{path} holds no predictions of fpt-fast, its columns are {header}")
    try:
        numbers = torch.tensor([[float(value) for value in row[3:]] for row in rows])
        regression = columns == ["grade"]
        if not regression:
            classes = tuple(column.removeprefix("probability_") for column in columns)
        elif classes is None:
            raise ValueError("grades need the names of the classes in their order")
        label_of = {name: label for label, name in enumerate(classes)} | {"": UNLABELLED}
        labels = torch.tensor([label_of[row[1]] for row in rows])
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path} holds a row that does not fit its columns: {error}") from error
    keys = tuple(row[0] for row in rows)
    if regression:
        return Predictions(keys, labels, numbers, None, cuts), tuple(classes)
    smallest = torch.finfo(torch.float32).tiny
    return Predictions(keys, labels, numbers.clamp(min=smallest).log(), numbers), tuple(classes)


def _write_findings(path: Path, predictions: Predictions, findings: Sequence[str]) -> None:
    assert predictions.probabilities is not None
    called = predicted_classes(predictions, len(findings))
    with write_atomically(path) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["key", *(kind + name for kind in _KINDS for name in findings)])
        for key, labels, calls, values in zip(
            predictions.keys,
            predictions.labels.tolist(),
            called.tolist(),
            predictions.probabilities.tolist(),
            strict=True,
        ):
            told = ["" if label == UNLABELLED else label for label in labels]
            rows.writerow([key, *told, *calls, *(f"{value:.9g}" for value in values)])


def _read_findings(
    path: Path, header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[Predictions, tuple[str, ...]]:
    """What ``_write_findings`` wrote; logits are those of the probabilities."""
    findings = tuple(name.removeprefix(_LABEL) for name in header if name.startswith(_LABEL))
    count = len(findings)
    if list(header) != ["key", *(kind + name for kind in _KINDS for name in findings)] or not rows:
        raise ValueError(f"{path} holds no predictions of fpt-fast, its columns are {header}")
    try:
        labels = [[int(cell or UNLABELLED) for cell in row[1 : count + 1]] for row in rows]
        numbers = torch.tensor([[float(cell) for cell in row[2 * count + 1 :]] for row in rows])
    except ValueError as error:
        raise ValueError(f"{path} holds a row that does not fit its columns: {error}") from error
    # A probability of 1 is one that f32 could not tell from it.
    logits = torch.logit(numbers.double(), eps=1e-9).float()
    keys = tuple(row[0] for row in rows)
    return Predictions(keys, torch.tensor(labels), logits, numbers), findings


def _name(column: str) -> str:
    return column.removeprefix(_LABEL)


def _write_values(path: Path, predictions: Predictions, name: str) -> None:
    with write_atomically(path) as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["key", _LABEL + name, _VALUE + name])
        for key, label, value in zip(
            predictions.keys,
            predictions.labels.tolist(),
            predictions.logits[:, 0].tolist(),
            strict=True,
        ):
            # Seventeen digits read back as the same f64.
            rows.writerow([key, "" if math.isnan(label) else repr(label), f"{value:.17g}"])


def _read_values(
    path: Path, rows: Sequence[Sequence[str]], name: str
) -> tuple[Predictions, tuple[str, ...]]:
    """What ``_write_values`` wrote."""
    try:
        labels = [float(row[1] or "nan") for row in rows]
        values = [[float(row[2])] for row in rows]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} holds a row that does not fit its columns: {error}") from error
    keys = tuple(row[0] for row in rows)
    numbers = torch.tensor(values, dtype=torch.float64).reshape(-1, 1)
    return Predictions(keys, torch.tensor(labels, dtype=torch.float64), numbers, None), (name,)


def _write_yaml(path: Path, config: Mapping[str, Any]) -> None:
    import yaml

    with write_atomically(path) as file:
        yaml.safe_dump(plain_values(config), file, sort_keys=False, allow_unicode=True)


def plain_values(value: Any) -> Any:
    """Turn tuples into lists and paths into text, all the way down, as YAML wants it."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    return str(value) if isinstance(value, Path) else value
