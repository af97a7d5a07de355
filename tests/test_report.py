"""Run files and the report page: what they say, that they stand alone, that names stay names."""

import base64
import csv
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml
from token_examples import looking_example, make_example

from fpt_fast.metrics import compute_metrics
from fpt_fast.records import (
    UNLABELLED,
    EpochRecord,
    Predictions,
    TrainingHistory,
)
from fpt_fast.report import (
    read_predictions,
    worst_first,
    write_predictions,
    write_report,
    write_run_files,
)
from fpt_fast.report.predictions_table import predictions_table
from fpt_fast.trust import Assessment, assess

CLASSES = ("gesund", "轻度 $2^x$", "_<script>alert('x')</script>", 'a, "b" & c')


def make_predictions(count: int = 40, classes: int = 4, present: int = 4) -> Predictions:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % present
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1
    keys = tuple(f"test/<b>{i}</b>, ü.png" for i in range(count))
    return Predictions(keys, labels, logits, logits.softmax(dim=1))


def make_history(*, val: bool = True) -> TrainingHistory:
    records = tuple(
        EpochRecord(
            epoch=e,
            loss=1.0 / (e + 1),
            learning_rate=1e-3,
            seconds=1.25,
            val={"loss": 2.0, "auc": math.nan if e == 0 else 0.5 + e / 10} if val else {},
        )
        for e in range(3)
    )
    return TrainingHistory(records, "auc", 2, 0.7 if val else None)


class Page(HTMLParser):
    """Tags, attributes and text of a page, as a browser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self, kind: str) -> list[bytes]:
        head = f"data:image/{kind};base64,"
        return [
            base64.b64decode(value.removeprefix(head))
            for tag, name, value in self.attributes
            if (tag, name) == ("img", "src") and value.startswith(head)
        ]


def report(folder: Path, **changes: Any) -> Page:
    predictions = changes.pop("predictions", make_predictions())
    classes = changes.pop("classes", CLASSES)
    values: dict[str, Any] = {
        "history": make_history(),
        "predictions": predictions,
        "classes": classes,
        "assessment": changes.get("assessment") or assess(predictions, len(classes), resamples=50),
        "examples": [make_example()],
        "settings": {"data": "<i>data</i>", "layers": [6, 7], "nested": {"seed": 3, "none": None}},
        **changes,
    }
    path = write_report(folder, **values)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_run_files(tmp_path: Path) -> None:
    predictions = make_predictions(present=3)
    assessment = assess(predictions, 4, resamples=50)
    metrics = assessment.metrics
    config = {"layers": (6, 7), "path": tmp_path, "größe": {"x": None, "y": 1e-4}}
    paths = write_run_files(
        tmp_path,
        predictions=predictions,
        classes=CLASSES,
        assessment=assessment,
        history=make_history(),
        config=config,
    )
    assert sorted(path.name for path in paths) == sorted(p.name for p in tmp_path.iterdir())
    assert yaml.safe_load((tmp_path / "config.yaml").read_text(encoding="utf-8")) == {
        "layers": [6, 7],
        "path": str(tmp_path),
        "größe": {"x": None, "y": 1e-4},
    }
    values = json.loads(
        (tmp_path / "metrics.json").read_text(encoding="utf-8"),
        parse_constant=lambda text: pytest.fail(f"{text} is not JSON"),
    )
    assert values["auc"] == metrics["auc"]
    assert values["per_class"][3]["auc"] is None
    assert assessment.intervals is not None
    interval = assessment.intervals["auc"]
    assert values["intervals"]["values"]["auc"] == [interval.low, interval.high]
    assert values["intervals"]["per_class"]["auc"][3] == [None, None]
    assert (values["intervals"]["resamples"], values["intervals"]["method"]) == (50, "percentile")
    assert values["missing_classes"] == [CLASSES[3]]
    assert values["classes"] == list(CLASSES)
    assert values["best_epoch"] == 2
    assert np.sum(values["confusion"]) == 40

    with (tmp_path / "history.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert [row["val_auc"] for row in rows] == ["", "0.6", "0.7"]
    assert float(rows[1]["loss"]) == 0.5

    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert predictions.probabilities is not None
    assert [row["key"] for row in rows] == list(predictions.keys)
    assert [row["label"] for row in rows] == [CLASSES[i] for i in predictions.labels]
    assert [row["predicted"] for row in rows] == [CLASSES[i] for i in predictions.logits.argmax(1)]
    for number, name in enumerate(CLASSES):
        column = [float(row[f"probability_{name}"]) for row in rows]
        assert column == pytest.approx(predictions.probabilities[:, number].tolist(), rel=1e-6)


def test_run_files_of_another_split_and_without_labels(tmp_path: Path) -> None:
    known = make_predictions()
    labels = known.labels.clone()
    labels[3] = UNLABELLED
    predictions = Predictions(known.keys, labels, known.logits, known.probabilities)
    metrics = compute_metrics(predictions, 4)
    write_run_files(
        tmp_path,
        predictions=predictions,
        classes=CLASSES,
        assessment=Assessment(metrics),
        suffix="-val",
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics-val.json", "predictions-val.csv"]
    with (tmp_path / "predictions-val.csv").open(encoding="utf-8", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)][2:4] == [CLASSES[2], ""]


def test_run_files_of_a_regression(tmp_path: Path) -> None:
    predictions = Predictions(
        ("a", "b"), torch.tensor([0, 2]), torch.tensor([[0.25], [1.75]]), None
    )
    assessment = Assessment(compute_metrics(predictions, 3))
    write_run_files(
        tmp_path, predictions=predictions, classes=("x", "y", "z"), assessment=assessment
    )
    assert (tmp_path / "predictions.csv").read_text() == (
        "key,label,predicted,grade\na,x,x,0.25\nb,z,z,1.75\n"
    )
    page = report(
        tmp_path,
        predictions=predictions,
        classes=("x", "y", "z"),
        examples=(),
        history=None,
        settings=None,
    )
    assert "Mean absolute error" in page.text
    assert "ROC" not in page.text
    assert "Learning curves" not in page.text
    assert "img" not in page.tags


def test_names_must_fit(tmp_path: Path) -> None:
    predictions = make_predictions()
    assessment = Assessment(compute_metrics(predictions, 4))
    with pytest.raises(ValueError, match="got 3 names"):
        write_run_files(
            tmp_path, predictions=predictions, classes=CLASSES[:3], assessment=assessment
        )
    with pytest.raises(ValueError, match="got 3 names"):
        report(tmp_path, predictions=predictions, classes=CLASSES[:3], assessment=assessment)


def test_report_says_what_happened(tmp_path: Path) -> None:
    predictions = make_predictions(present=3)
    assessment = assess(predictions, 4, resamples=50)
    metrics = assessment.metrics
    page = report(tmp_path / "my run", predictions=predictions)
    assert assessment.intervals is not None
    for interval in (assessment.intervals["kappa"], assessment.intervals.per_class["recall"][1]):
        assert f"[{interval.low:.3f}, {interval.high:.3f}]" in page.text
    assert "95% confidence intervals: percentile bootstrap, 50 resamples of images" in page.text
    for name in CLASSES:
        assert page.text.count(name) >= 3
    for value in ("auc", "accuracy", "f1", "kappa", "auc_raw_logits"):
        assert f"{metrics[value]:.3f}" in page.text
    assert "my run" in page.text
    assert "40 test images, 4 classes; 3 epochs trained" in page.text
    assert "best on validation: epoch 3 (AUC 0.700)" in page.text
    assert f"No image of “{CLASSES[3]}” in this split" in page.text
    assert f"predicted {CLASSES[2]} (60.0%): right" in page.text
    assert "2 layers × 2 heads" in page.text
    for setting in ("<i>data</i>", "6, 7", "nested.seed"):
        assert setting in page.text
    # Learning curves, ROC and reliability; the image, and the image with its tokens.
    assert [len(page.images(kind)) for kind in ("svg+xml", "jpeg", "png")] == [3, 1, 1]
    assert "Without validation images no temperature was fitted" in page.text
    assert "Operating points" not in page.text


def test_report_of_calibration_and_operating_points(tmp_path: Path) -> None:
    predictions, validation = make_predictions(), make_predictions(count=60)
    assessment = assess(predictions, 4, validation=validation, at_sensitivity=(0.75,), resamples=50)
    page = report(tmp_path, predictions=predictions, assessment=assessment)
    calibration = assessment.calibration
    assert calibration is not None and calibration.scaled is not None
    assert f"at temperature {calibration.temperature:.3f}" in page.text
    for errors in (calibration.plain, calibration.scaled):
        for value in (errors.ece, errors.nll, errors.brier):
            assert f"{value.estimate:.3f}[{value.low:.3f}, {value.high:.3f}]" in page.text
    for name in CLASSES:
        assert f"{name}, specificity 90%" in page.text
        assert f"{name}, sensitivity 75%" in page.text
    for point in assessment.points:
        rates = (point.chosen.threshold, point.sensitivity.estimate, point.npv.estimate)
        for value in rates:
            assert (f"{value:.3f}" if math.isfinite(value) else "–") in page.text
    drawn = "".join(ElementTree.fromstring(page.images("svg+xml")[-1]).itertext())
    assert "share right" in drawn
    assert f"at temperature {calibration.temperature:.2f}" in drawn


def test_predictions_are_read_back_as_they_were(tmp_path: Path) -> None:
    known = make_predictions()
    labels = known.labels.clone()
    labels[2] = UNLABELLED
    logits = known.logits.clone()
    logits[0] = torch.tensor([0.0, 300.0, 0.0, 0.0])  # probabilities of exactly 0 and 1
    predictions = Predictions(known.keys, labels, logits, logits.softmax(dim=1))
    path = tmp_path / "p.csv"
    write_predictions(path, predictions, CLASSES)
    back, classes = read_predictions(path)
    assert (back.keys, classes) == (predictions.keys, CLASSES)
    assert torch.equal(back.labels, labels)
    assert back.probabilities is not None and predictions.probabilities is not None
    assert torch.equal(back.probabilities, predictions.probabilities)
    torch.testing.assert_close(back.logits.softmax(1), predictions.probabilities)
    assert bool(back.logits.isfinite().all())
    grades = Predictions(("a", "b"), torch.tensor([0, 1]), torch.tensor([[0.3], [1.75]]), None)
    write_predictions(path, grades, ("low", "high"))
    again, _ = read_predictions(path, ("low", "high"))
    assert torch.equal(again.logits, grades.logits) and torch.equal(again.labels, grades.labels)
    with pytest.raises(ValueError, match="grades need the names of the classes"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "empty"),
        ("a,b\n1,2\n", "holds no predictions of fpt-fast"),
        ("key,label,predicted,probability_x\n", "holds no predictions"),
        ("key,label,predicted,probability_x\nk,x,x,much\n", "does not fit its columns"),
        ("key,label,predicted,probability_x\nk,y,x,1\n", "does not fit its columns: 'y'"),
    ],
)
def test_other_files_are_no_predictions(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "p.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_predictions(path)
    with pytest.raises(ValueError, match="cannot read predictions"):
        read_predictions(tmp_path / "none.csv")


def test_report_stands_alone_and_names_stay_names(tmp_path: Path) -> None:
    page = report(tmp_path / "<script>run")
    assert not {"link", "iframe", "b", "i"} & set(page.tags)
    # Our own, which alone may run: the page's policy names its hash.
    assert page.tags.count("script") == 1
    for tag, name, value in page.attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or value.startswith("data:image/"), (tag, name, value)
    style = re.search(
        r"<style>(.*?)</style>", (tmp_path / "<script>run/report.html").read_text(), re.S
    )
    assert style is not None
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_figures_are_valid_svg_with_every_name(tmp_path: Path) -> None:
    page = report(tmp_path)
    curves, roc, _ = (ElementTree.fromstring(image) for image in page.images("svg+xml"))
    text = "".join(roc.itertext())
    assert "轻度 $2^x$" in text
    assert "<script>" in text
    assert "validation" in "".join(curves.itertext())
    for figure in (curves, roc):
        assert not any(element.tag.endswith("script") for element in figure.iter())


def test_equal_runs_give_equal_pages(tmp_path: Path) -> None:
    report(tmp_path / "a" / "run")
    report(tmp_path / "b" / "run")
    assert (tmp_path / "a/run/report.html").read_bytes() == (
        tmp_path / "b/run/report.html"
    ).read_bytes()


@pytest.mark.parametrize("labels", [[0, 0, 0, 0], [0, 1, 0, 1]])
def test_report_of_few_classes(tmp_path: Path, labels: list[int]) -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
    predictions = Predictions(tuple("abcd"), torch.tensor(labels), logits, logits.softmax(dim=1))
    page = report(
        tmp_path,
        predictions=predictions,
        classes=("x", "y"),
        examples=(),
        history=make_history(val=False),
    )
    one_class = len(set(labels)) == 1
    assert ("auc is not defined" in page.text) == one_class
    assert len(page.images("svg+xml")) == (2 if one_class else 3)


def test_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    [script] = re.findall(r"<script>(.*?)</script>", text, re.S)
    [policy] = re.findall(r"script-src '(sha256-[^']*)'", text)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"sha256-{digest}"


def test_the_table_lists_the_worst_first_and_says_what_it_leaves_out() -> None:
    logits = torch.tensor([[4.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 1.0]])
    predictions = Predictions(
        tuple("abcd"), torch.tensor([0, 0, 0, UNLABELLED]), logits, logits.softmax(1)
    )
    assert worst_first(predictions, 2) == ["b", "c", "d", "a"]
    table = predictions_table(predictions, ("x", "y"), {"b": b"jpeg"}, limit=2)
    assert "The 2 worst of 4" in table and table.count("<tr>") == 3
    assert base64.b64encode(b"jpeg").decode() in table


def _cells(table: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in cells]


def test_the_table_of_grades_has_their_errors_the_largest_first() -> None:
    predictions = Predictions(
        tuple("abcd"),
        torch.tensor([0, 2, 1, UNLABELLED]),
        torch.tensor([[0.25], [0.5], [1.5], [1.0]]),
        None,
        (0.2, 1.75),
    )
    names = ("none", "mild <b>", "severe")
    assert worst_first(predictions, 3) == ["b", "c", "a", "d"]
    table = predictions_table(predictions, names, {"c": b"jpeg"})
    head, *rows = _cells(table)
    assert head[1:] == ["image", "true", "predicted", "verdict", "grade", "error", "off by"]
    assert [row[1:] for row in rows] == [
        ["b", "severe", "mild &lt;b&gt;", "wrong", "0.500", "-1.5", "1.5"],
        ["c", "mild &lt;b&gt;", "mild &lt;b&gt;", "right", "1.500", "0.5", "0.5"],
        ["a", "none", "mild &lt;b&gt;", "wrong", "0.250", "0.25", "0.25"],
        ["d", "", "mild &lt;b&gt;", "", "1.000", "", ""],
    ]
    assert table.count("<img") == 1 and table.count("<option>severe</option>") == 2
    page = predictions_table(predictions, names, {}, limit=1)
    assert "The 1 worst of 4" in page and page.count("<tr>") == 2


def test_the_table_of_numbers_has_their_errors_the_largest_first() -> None:
    labels = torch.tensor([-3.5, 1200.0, math.nan, 7.0], dtype=torch.float64)
    values = torch.tensor([[-3.0], [1100.0], [2.0], [19.0]], dtype=torch.float64)
    predictions = Predictions(tuple("abcd"), labels, values, None)
    assert worst_first(predictions, 1) == ["b", "d", "a", "c"]
    table = predictions_table(predictions, ("age",), {"b": b"jpeg"})
    head, *rows = _cells(table)
    assert head[1:] == ["image", "true", "predicted", "error", "off by"]
    assert [row[1:] for row in rows] == [
        ["b", "1200", "1100", "-100", "100"],
        ["d", "7", "19", "12", "12"],
        ["a", "-3.5", "-3", "0.5", "0.5"],
        ["c", "", "2", "", ""],
    ]
    assert "<select" not in table and 'name="key"' in table and table.count("<img") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"output": 1.25, "grade": 1, "label": 1}, f"predicted {CLASSES[1]} (1.25): right"),
        ({"output": 1.25, "grade": 1, "label": 0}, f"(1.25): wrong; it is {CLASSES[0]}."),
        ({"output": 1.25, "grade": 1, "label": UNLABELLED}, f"predicted {CLASSES[1]} (1.25)."),
        ({"output": 61.5, "value": 60.0}, "predicted 61.5; it is 60, off by 1.5."),
        ({"output": 61.5}, "predicted 61.5."),
    ],
)
def test_kept_tokens_of_grades_and_numbers(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    example = make_example(probabilities=torch.empty(0), **changes)
    assert said in report(tmp_path, examples=[example]).text


def test_the_page_shows_where_prompts_look(tmp_path: Path) -> None:
    page = report(tmp_path, examples=[looking_example()])
    assert [len(page.images(kind)) for kind in ("jpeg", "png")] == [1, 2]
    assert "The patch looked at most has 37.5% of the attention." in page.text
    assert "where the prompts look" in page.text
