"""The files of a sweep say what its models did."""

import csv
import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fpt_fast.report.sweep import SweepRow, markdown, plot, summarise, write_sweep_files

ROWS = [
    SweepRow("lr1e-4-seed0", {"learning_rate": 1e-4, "seed": 0}, 3, 0.80, {"auc": 0.7}, None),
    SweepRow("lr1e-4-seed1", {"learning_rate": 1e-4, "seed": 1}, 1, 0.90, {"auc": 0.9}, None),
    SweepRow("lr1e-3-seed0", {"learning_rate": 1e-3, "seed": 0}, 2, 0.95, {"auc": 0.8}, None),
    SweepRow("lr1e-3-seed1", {"learning_rate": 1e-3, "seed": 1}, None, None, {}, "its loss"),
]


def test_means_spreads_and_order() -> None:
    best, other = summarise(ROWS, "auc")
    assert best.setting == (("learning_rate", 1e-3),) and (best.models, best.ended) == (2, 1)
    assert best.values["val_auc"][0] == 0.95 and math.isnan(best.values["val_auc"][1])
    mean, spread = other.values["auc"]
    assert mean == pytest.approx(0.8) and spread == pytest.approx(math.sqrt(0.02))
    assert summarise(ROWS, "loss")[0].setting == (("learning_rate", 1e-4),)


def test_markdown() -> None:
    assert markdown(summarise(ROWS, "auc"), "test") == (
        "| learning_rate | models | val_auc | test_auc |\n"
        "| --- | --- | --- | --- |\n"
        "| 0.001 | 2 (1 ended) | 0.9500 | 0.8000 |\n"
        "| 0.0001 | 2 | 0.8500 ± 0.0707 | 0.8000 ± 0.1414 |\n"
    )


def test_files(tmp_path: Path) -> None:
    paths = write_sweep_files(tmp_path, ROWS, "auc", "test")
    assert [path.name for path in paths] == ["sweep.csv", "summary.csv", "summary.md", "sweep.svg"]
    rows = list(csv.DictReader(paths[0].open()))
    assert rows[1] == {
        "model": "lr1e-4-seed1",
        "learning_rate": "0.0001",
        "seed": "1",
        "best_epoch": "1",
        "val_auc": "0.9",
        "test_auc": "0.9",
        "ended": "",
    }
    assert rows[3]["val_auc"] == "" and rows[3]["ended"] == "its loss"
    summary = list(csv.DictReader(paths[1].open()))
    assert summary[0]["models"] == "2" and summary[0]["val_auc_deviation"] == ""
    ElementTree.fromstring(paths[3].read_bytes())


def test_plot_of_seeds_alone_and_of_three_settings() -> None:
    seeds = [
        SweepRow(f"seed{n}", {"seed": n}, 1, 0.8 + n / 50, {"auc": 0.8}, None) for n in range(3)
    ]
    assert b"seed" in plot(seeds, "auc")
    many = [
        SweepRow("x", {"learning_rate": lr, "num_prompts": p, "seed": 0}, 1, lr + p, {}, None)
        for lr in (0.1, 0.2)
        for p in (4, 8)
    ]
    drawn = plot(many, "auc")
    assert b"num_prompts 4" in drawn and b"learning rate" in drawn
    assert markdown(summarise(seeds, "auc"), "test").startswith("| models | val_auc | test_auc |")
