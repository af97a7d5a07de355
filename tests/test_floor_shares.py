"""The measurement behind docs/cpu-floors.md, at tiny sizes, whose times say nothing."""

import json
import time
from collections.abc import Iterator

import pytest

from benchmarks import bench_cache
from benchmarks.counts import Ceilings, Count
from benchmarks.floor_shares import measure
from benchmarks.floor_tables import DOCUMENT, END, START, render
from benchmarks.turns import best_times, share


def test_a_share_is_that_of_the_larger_time() -> None:
    ceilings = Ceilings(bandwidth=100, flops={"float32": 1000})
    assert share(Count(flops=4000, bytes=100), ceilings, 8.0)["share"] == 0.5
    assert share(Count(flops=1000, bytes=400), ceilings, 8.0)["share"] == 0.5


def test_times_are_taken_in_turns_and_the_first_does_not_count() -> None:
    seen = []
    best = best_times(
        {"slow at first": lambda: seen.append(1) or time.sleep(0.0 if len(seen) > 2 else 0.05)}
        | {"other": lambda: seen.append(2)},
        rounds=2,
        clock=time.perf_counter,
    )
    assert seen == [1, 2] * 3
    assert best["slow at first"] < 0.05


@pytest.fixture
def few_records(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    layout = bench_cache.RecordLayout(layers=1, heads=2, kept=5, head_width=8)
    monkeypatch.setattr(bench_cache, "LAYOUT", layout)
    monkeypatch.setattr(bench_cache, "RECORDS", 16)
    monkeypatch.setattr(bench_cache, "KEYS", [f"{i}.png" for i in range(16)])
    yield


@pytest.mark.usefixtures("few_records")
def test_every_row_is_measured_and_stands_in_a_table() -> None:
    result = json.loads(json.dumps(measure(full=False, rounds=1)))
    assert len(result["ops"]) == 3 * 3 + 2 and len(result["reading"]) == 4
    for row in [*result["ops"], *result["steps"], result["frozen_pass"]]:
        assert row["seconds"] > 0 and row["floor_seconds"] > 0
        assert row["share"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    for row in result["steps"]:
        assert sum(row["parts"].values()) == pytest.approx(1)
        assert not [part for part, share in row["parts"].items() if share == 0]
    text = render(result)
    rows = 11 + 4 + 4 + 4 + 1
    assert sum(line.startswith("| ") for line in text.splitlines()) == rows + 2 * 5


def test_the_document_has_its_tables() -> None:
    tables = DOCUMENT.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    for name in ("prompt_attention", "side_attention", "FPT+", "FPT", "pread", "bfloat16"):
        assert name in tables
