"""The page of several runs: what it says is what the runs' files say, and it stands alone."""

import csv
import dataclasses
import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import torch
import yaml
from compared_runs import (
    CLASSES,
    predict,
    predict_findings,
    predict_numbers,
    write_images,
    write_run,
    write_runs,
)

from fpt_fast.cli import main
from fpt_fast.config import ConfigError
from fpt_fast.pipeline import compare, compare_runs
from fpt_fast.records import UNLABELLED, Predictions
from fpt_fast.report import write_run_files
from fpt_fast.report.comparison_tests import holm
from fpt_fast.report.disagreement import disagreement_table
from fpt_fast.trust import assess, compare_predictions


def section(page: str, title: str) -> str:
    """The page from one heading to the next."""
    return page.split(f"<h2>{title}", 1)[1].split("<h2>", 1)[0]


def text_rows(html: str) -> list[list[str]]:
    """Rows of tables as the text of their cells."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S) for row in rows]
    return [[unescape(re.sub(r"<[^>]+>", " ", c)).strip() for c in row] for row in cells]


def test_what_the_page_says_is_in_the_runs_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = write_runs(tmp_path)
    output = tmp_path / "page.html"
    options = ["--resamples", "40", "--pictures", "5", "--output", str(output)]
    assert main(["compare", *map(str, runs), *options]) == 0
    page = output.read_text()
    # It asks nothing of any network.
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "url(" not in page
    metrics = [json.loads((run / "metrics.json").read_text()) for run in runs]
    for row, run, values in zip(
        text_rows(section(page, "Metrics"))[1:], runs, metrics, strict=True
    ):
        low, high = values["intervals"]["values"]["auc"]
        assert row[0] == run.name and row[1] == "60"
        assert row[2] == f"{values['auc']:.3f} [{low:.3f}, {high:.3f}]"
        assert f"{values['calibration']['plain']['ece']:.3f}" in row[-2]
        assert f"{run.name}  auc {values['auc']:.4f}" in capsys.readouterr().out or run != runs[0]
    settings = text_rows(section(page, "Settings that differ"))
    # Where a run lies is no difference; what came of a setting counts once.
    assert settings[1:] == [["learning_rate", "0.0001", "0.001", "0.01"]]
    _tests_agree(page)
    _disagreements_agree(page, runs)
    assert len(re.findall("image/svg", page)) == 1 + len(CLASSES)


def _tests_agree(page: str) -> None:
    keys = tuple(str(number) for number in range(60))
    rows = text_rows(section(page, "Differences"))[1:]
    assert len(rows) == 3
    found = compare_predictions(predict(keys, 0, 1.0), predict(keys, 2, 2.6), CLASSES, resamples=40)
    assert found.auc is not None
    first, second = rows[1][:2]
    assert re.split(r"\s+less\s+", first) == ["seed-0", "seed-2"]
    area = found.auc
    # predictions.csv keeps nine digits.
    assert second == f"{area.difference:.3f} [{area.low:.3f}, {area.high:.3f}]"
    raw, adjusted = ([row[column] for row in rows] for column in (2, 3))
    numbers = [float(text.removeprefix("< ")) for text in raw]
    expected = holm(numbers)
    for said, p in zip(adjusted, expected, strict=True):
        assert said.startswith("<") or float(said) == pytest.approx(p, abs=2e-4)


def _disagreements_agree(page: str, runs: list[Path]) -> None:
    tables = [list(csv.DictReader((run / "predictions.csv").open())) for run in runs]
    differing = {
        rows[0]["key"]: [row["predicted"] for row in rows]
        for rows in zip(*tables, strict=True)
        if len({row["predicted"] for row in rows}) > 1
    }
    shown = section(page, "Images on which they disagree")
    assert f"The runs differ on {len(differing)} images, of 60 images" in shown
    rows = text_rows(shown)[1:]
    truths = {row["key"]: row["label"] for row in tables[0]}
    assert {row[1] for row in rows} == set(differing)
    for _, key, truth, right, *calls in rows:
        called = differing[key]
        assert truth == truths[key]
        assert right == f"{called.count(truth)} of 3"
        for call, name in zip(calls, called, strict=True):
            assert call.startswith(f"{name} 0.")
            assert call.endswith("✓" if name == truth else "✗")
    assert shown.count("data:image/jpeg") == 5
    spread = [_spread(key, tables) for key in (row[1] for row in rows)]
    assert spread == sorted(spread, reverse=True)


def _spread(key: str, tables: list[list[dict[str, str]]]) -> float:
    values = []
    for table in tables:
        [row] = [row for row in table if row["key"] == key]
        values.append(float(row[f"probability_{row['label']}"]))
    return max(values) - min(values)


def test_each_finding_is_tested_between_two_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = write_images(tmp_path / "images", 42)
    findings = ("mass", "nodule <b>", "never there")
    skills = {"poor": 0.1, "good": 1.5}
    runs = [
        write_run(
            tmp_path / name, predict_findings(keys, seed, skill), tmp_path / "images",
            classes=findings,
        )
        for seed, (name, skill) in enumerate(skills.items())
    ]  # fmt: skip
    output = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--resamples", "40", "--output", str(output)]) == 0
    said = capsys.readouterr().out
    page = output.read_text()
    assert "42 test images, 3 findings" in page and "<b>" not in page
    poor, good = (predict_findings(keys, seed, skill) for seed, skill in enumerate(skills.values()))
    found = compare_predictions(poor, good, findings, resamples=40)
    differences = section(page, "Differences")
    assert "of all metrics by paired bootstrap" in differences
    table, by_finding = differences.split("<h3>AUC of each finding")
    macro = found.differences["auc"]
    assert text_rows(table)[1][1] == f"{macro.estimate:.3f} [{macro.low:.3f}, {macro.high:.3f}]"
    rows = text_rows(by_finding)[1:]
    assert [row[1] for row in rows] == list(findings)
    assert rows[2][2:] == ["–"] * 5
    areas = [area for area in found.per_class if area is not None]
    assert len(areas) == 2
    for row, area, adjusted in zip(rows, areas, holm([a.p for a in areas]), strict=False):
        assert re.split(r"\s+less\s+", row[0]) == ["poor", "good"]
        assert row[2:5] == [
            f"{area.first:.3f}",
            f"{area.second:.3f}",
            f"{area.difference:.3f} [{area.low:.3f}, {area.high:.3f}]",
        ]
        for text, p in zip(row[5:], (area.p, adjusted), strict=True):
            assert text == "< 0.0001" if p < 1e-4 else float(text) == pytest.approx(p, abs=2e-4)
    assert "poor less good\n  AUC of mass: " in said
    assert "  AUC of never there: not compared, 0 of 42 images with it" in said
    assert f"p {areas[1].p:.4g} (DeLong)" in said
    assert main(["compare", *map(str, runs), "--resamples", "40"]) == 0
    assert f"AUC of nodule <b>: {areas[1].first:.4f} against" in capsys.readouterr().out


def test_the_terminal_says_what_is_in_common_and_what_has_no_test(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = write_images(tmp_path / "images", 22)
    names = ("disc", "lesion", "artefact")
    runs = []
    # Of the last ten, which both have, the first finding is unknown of two and there on five.
    for number, part in enumerate((slice(0, 22), slice(12, 22))):
        whole = predict_findings(keys, number, 1.0)
        assert whole.probabilities is not None
        cut = Predictions(
            keys[part], whole.labels[part], whole.logits[part], whole.probabilities[part]
        )
        folder = tmp_path / "runs" / f"r{number}"
        runs.append(write_run(folder, cut, tmp_path / "images", classes=names))
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, runs), "--output", str(page)]) == 0
    said = capsys.readouterr().out
    common = "The runs have 10 images in common: differences and disagreements are of those"
    assert f"note: {common}" in said and common in page.read_text()
    tests = "DeLong's test takes two with and two without"
    assert f"AUC of artefact: not compared, 0 of 10 images with it: {tests}\n" in said
    assert said.count("not compared") == 1 and said.count("(DeLong)") == 2
    # Without a page the two are refused, and the page is named.
    assert main(["compare", *map(str, runs)]) == 1
    hint = "--output PAGE.html compares them on the 10 images of both"
    assert hint in capsys.readouterr().err


def test_numbers_are_compared_and_those_furthest_apart_shown(tmp_path: Path) -> None:
    keys = write_images(tmp_path / "images", 12)
    far, near = predict_numbers(keys, 0, 6.0), predict_numbers(keys, 1, 1.0)
    runs = [
        write_run(tmp_path / name, predictions, tmp_path / "images", classes=("age",))
        for name, predictions in (("far", far), ("near", near))
    ]
    found = compare_runs(runs, output=tmp_path / "page.html", resamples=40, pictures=3)
    assert "r2" in str(found) and "DeLong" not in str(found)
    page = found.page.read_text()
    assert "12 test images, the number age" in page and page.count("data:image/jpeg") == 3
    titles, row = text_rows(section(page, "Differences"))
    shown = dict(zip(titles, row, strict=True))
    difference = compare_predictions(far, near, ("age",), resamples=40).differences["mae"]
    assert shown["Mean absolute error"].startswith(f"{difference.estimate:.3f} [")
    rows = text_rows(section(page, "Images on which they disagree"))[1:]
    apart = (far.logits - near.logits).abs()[:, 0]
    assert [row[1] for row in rows] == [keys[at] for at in apart.argsort(descending=True).tolist()]
    for _, key, truth, off, *said in rows:
        at = keys.index(key)
        numbers = [float(run.logits[at]) for run in (far, near)]
        assert [float(text) for text in said] == pytest.approx(numbers, rel=1e-4)
        if at == 0:
            assert (truth, off) == ("", "")
            continue
        assert float(truth) == pytest.approx(float(far.labels[at]), rel=1e-4)
        worst = max(abs(number - float(far.labels[at])) for number in numbers)
        assert float(off) == pytest.approx(worst, rel=1e-4)


def test_kappa_says_its_weights(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, images=30)
    said = str(compare_runs(runs, output=tmp_path / "page.html", resamples=10)).split("page:")[0]
    assert "quadratic kappa 0." in said and said.count("kappa") == said.count("quadratic kappa")
    page = (tmp_path / "page.html").read_text()
    assert page.count("Quadratic kappa") == 2 and len(re.findall("(?i)kappa", page)) == 2


def test_holm_agrees_with_a_published_example() -> None:
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([float("nan"), 0.4, 0.9])
    assert adjusted[1:] == pytest.approx([0.8, 0.9]) and adjusted[0] != adjusted[0]


def test_folds_share_no_image_and_pooled_folds_share_all(tmp_path: Path) -> None:
    data = tmp_path / "images"
    keys = write_images(data, 30)
    for name, skill in (("lr1e-3", 1.0), ("lr1e-4", 2.0)):
        every = predict(keys, 3, skill)
        for fold, part in ((1, keys[:15]), (2, keys[15:])):
            write_run(
                tmp_path / f"cv/repeat-1-fold-{fold}/{name}", predict(part, fold, skill), data
            )
        write_run(tmp_path / f"cv/repeat-1-pooled/{name}", every, data)
        # A pooled folder has no configuration and no history of its own.
        for file in ("config.yaml", "history.csv"):
            (tmp_path / f"cv/repeat-1-pooled/{name}/{file}").unlink()
    folds = [tmp_path / f"cv/repeat-1-fold-{fold}/lr1e-3" for fold in (1, 2)]
    found = compare_runs(folds, output=tmp_path / "folds.html", resamples=20)
    page = (tmp_path / "folds.html").read_text()
    assert found.pairs == () and "No image is in the predictions of all runs" in page
    assert [run.name for run in found.runs] == ["repeat-1-fold-1/lr1e-3", "repeat-1-fold-2/lr1e-3"]
    assert "<h2>Images on which" not in page and "<h2>Learning curves" in page
    found = compare_runs([tmp_path / "cv"], output=tmp_path / "cv.html", resamples=20)
    assert [run.name for run in found.runs] == ["lr1e-3", "lr1e-4"] and len(found.pairs) == 1
    page = (tmp_path / "cv.html").read_text()
    assert "<h2>Learning curves" not in page and "data:image/jpeg" in page


def test_many_runs_are_tested_against_the_first(tmp_path: Path) -> None:
    keys = write_images(tmp_path / "images", 12)
    for number in range(7):
        write_run(tmp_path / f"sweep/m{number}", predict(keys, number, 1.0), tmp_path / "images")
    found = compare_runs([tmp_path / "sweep"], output=tmp_path / "page.html", resamples=10)
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, n) for n in range(1, 7)]


def test_patients_are_drawn_whole_and_lost_pictures_are_told(tmp_path: Path) -> None:
    runs = write_runs(tmp_path, images=30)
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["settings"]["patient_pattern"] = r"([0-9ab])\d*\.png"
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    alone = compare_runs(runs[:2], output=tmp_path / "page.html", resamples=50).pairs[0]
    assert "draw whole patients" in (tmp_path / "page.html").read_text()
    in_words = compare(*runs[:2], resamples=50)
    for name, interval in alone.comparison.differences.items():
        assert in_words.differences.get(name, interval) == interval, name
    assert str(in_words).count("(paired bootstrap of patients)") == len(in_words.differences)
    assert "note: DeLong's test takes images, not patients, as independent" in str(in_words)
    assert in_words.to_json()["units"] == "patients"
    shutil.rmtree(tmp_path / "images")
    assert "patients" not in str(compare(*runs[:2], resamples=50))
    without = compare_runs(runs[:2], output=tmp_path / "page.html", resamples=50).pairs[0]
    page = (tmp_path / "page.html").read_text()
    assert "the data is not where the runs say" in page and "data:image/jpeg" not in page
    assert "patients" not in page
    intervals = [pair.comparison.differences["accuracy"] for pair in (alone, without)]
    assert intervals[0].low != intervals[1].low


def test_findings_grades_and_unlabelled_images_in_the_table() -> None:
    keys = ("a", "b", "c")
    labels = torch.tensor([[1, 0], [UNLABELLED, 1], [0, 0]])
    low, high = torch.full((3, 2), 0.2), torch.full((3, 2), 0.2)
    high[0, 0], high[1, 0], low[1, 1] = 0.9, 0.8, 0.7
    findings = [
        (name, Predictions(keys, labels, torch.logit(p), p))
        for name, p in (("<i>low", low), ("high", high))
    ]
    rows = text_rows(disagreement_table(findings, ("edema", "mass"), {}))[1:]
    assert sorted(row[1:] for row in rows) == [
        ["a", "edema: present", "1 of 2", "not called 0.200 ✗", "called 0.900 ✓"],
        ["b", "edema: unknown", "", "not called 0.200", "called 0.800"],
        ["b", "mass: present", "1 of 2", "called 0.700 ✓", "not called 0.200 ✗"],
    ]
    assert "<i>" not in disagreement_table(findings, ("edema", "mass"), {})
    grades = [
        (name, Predictions(keys, torch.tensor([0, 2, UNLABELLED]), g[:, None], None))
        for name, g in (("x", torch.tensor([0.1, 1.9, 0.3])), ("y", torch.tensor([0.2, 0.6, 1.2])))
    ]
    rows = text_rows(disagreement_table(grades, ("none", "mild", "severe"), {}))[1:]
    assert [row[1:] for row in rows] == [
        ["b", "severe", "1 of 2", "severe 1.900 ✓", "mild 0.600 ✗"],
        ["c", "", "", "none 0.300", "mild 1.200"],
    ]
    same = disagreement_table([grades[0], ("z", grades[0][1])], ("none", "mild", "severe"), {})
    assert "differ on 0 images" in same and "<table" not in same


def test_grades_are_cut_where_each_run_says(tmp_path: Path) -> None:
    keys = ("a", "b", "c", "d")
    values = torch.tensor([[0.1], [0.6], [1.4], [2.2]])
    grades = Predictions(keys, torch.tensor([0, 1, 1, 2]), values, None)
    for name, cuts in (("learned", (0.7, 1.2)), ("halves", (0.5, 1.5))):
        folder = tmp_path / name
        folder.mkdir()
        cut = dataclasses.replace(grades, cuts=cuts)
        assessment = assess(cut, 3, resamples=10)
        write_run_files(folder, predictions=cut, classes=CLASSES, assessment=assessment)
        metrics = json.loads((folder / "metrics.json").read_text()) | {"grade_cuts": {"cuts": cuts}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    compare_runs([tmp_path / n for n in ("learned", "halves")], output=tmp_path / "p.html",
                 resamples=10)  # fmt: skip
    rows = text_rows(section((tmp_path / "p.html").read_text(), "Images on which they disagree"))
    assert [row[1:] for row in rows[1:]] == [
        ["b", "mild", "1 of 2", "healthy 0.600 ✗", "mild 0.600 ✓"],
        ["c", "mild", "1 of 2", "severe <b> 1.400 ✗", "mild 1.400 ✓"],
    ]


def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = write_runs(tmp_path, images=12)
    page = tmp_path / "page.html"
    for wrong, said in (
        ([runs[0]], "2 to 28 runs, got 1"),
        ([runs[0], runs[0]], "named twice"),
        ([runs[0], tmp_path / "nothing"], "there is no such folder"),
        ([runs[0], tmp_path / "images"], "no predictions.csv; make it first: train it"),
    ):
        with pytest.raises(ConfigError, match=said):
            compare_runs(wrong, output=page)
    with pytest.raises(ConfigError, match="fpt-fast evaluate --run .* --split val"):
        compare_runs(runs, output=page, split="val")
    assert main(["compare", *map(str, runs)]) == 1
    assert "takes two runs, got 3" in capsys.readouterr().err
    text = (runs[1] / "predictions.csv").read_text().splitlines()
    text[1] = text[1].replace(",healthy,", ",mild,", 1)
    (runs[1] / "predictions.csv").write_text("\n".join(text) + "\n")
    with pytest.raises(ConfigError, match="seed-0 and seed-1 cannot be compared: .*disagree"):
        compare_runs(runs, output=page, resamples=10)
    values = json.loads((runs[1] / "metrics.json").read_text())
    values["classes"] = [*CLASSES[:2], "other"]
    (runs[1] / "metrics.json").write_text(json.dumps(values))
    with pytest.raises((ConfigError, ValueError), match="compare runs on the same data"):
        compare_runs(runs, output=page)
    assert not page.exists()
