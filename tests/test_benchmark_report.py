"""Benchmark results as pages and comparisons, from made-up files."""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.beside import ratio_of_rounds
from benchmarks.report import __main__ as report
from benchmarks.report.compare import compare, is_about, red_files
from benchmarks.report.readme import END, START
from benchmarks.report.results import complaints, is_results, read_results
from helpers import ROOT

INFO = {"dtype": "float32", "bytes": 1000, "flops": 10, "share_of_floor": 0.5, "GB/s": 2.0}


def bench(name: str, median: float, file: str = "bench_cache.py", **info: Any) -> dict[str, Any]:
    return {
        "fullname": f"benchmarks/{file}::{name}",
        "name": name,
        "group": info.pop("group", "cache, read"),
        "params": info.pop("params", None),
        "stats": {"median": median},
        "extra_info": {**INFO, **info},
    }


def write(path: Path, *benches: dict[str, Any], cpu: str = "Zen", **more: Any) -> Path:
    content = {
        "machine_info": {"python_version": "3.11.7", "cpu": {"brand_raw": cpu, "count": 2}},
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": "2026-11-25T10:00:00",
        "benchmarks": list(benches),
        "sizes": "full",
        **more,
    }
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(f"# Title\n{START}\nold figures\n{END}\nthe rest\n")
    return path


def test_the_readme_block_and_nothing_else_is_rewritten(tmp_path: Path, readme: Path) -> None:
    rows = [
        bench("bench_frozen_pass", 0.344, plain_seconds=1.6, plain_over_ours=4.7, timm_seconds=0.3),
        bench(
            "bench_frozen_pass_memory[1024-4097]",
            9.0,
            params={"size": 1024},
            tokens=4097,
            added=2e8,
            plain_peak_added=1.8e9,
        ),
        bench("bench_training_step[fpt]", 0.5, method="fpt", plain_seconds=1.4, ratio=2.8),
    ]
    demo = tmp_path / "demo.json"
    aucs = {"fpt_plus_auc": 0.971, "side_alone_auc": 0.51, "linear_probe_auc": 0.989}
    demo.write_text(
        json.dumps({"images": 800, "classes": 4, "epochs": 20, "seconds": 143.2, **aucs})
    )
    one = write(tmp_path / "a.json", *rows)
    other = write(tmp_path / "b.json", *rows, cpu="Xeon")
    where = ["--readme", str(readme), "--docs", str(tmp_path / "docs"), "--demo", str(demo)]
    assert report.main([str(one), str(other), *where]) == 0
    text = readme.read_text()
    assert text.startswith(f"# Title\n{START}\n") and text.endswith(f"{END}\nthe rest\n")
    assert "old figures" not in text
    for line in (
        "Measured on Zen, 2 cores, no GPU, Python 3.11.7, by `make bench` at commit `0123456789`",
        "Measured on Xeon",
        "| preloading one image, float32 | 344 ms | 1.60 s | 4.7 |",
        "| memory added by one pass at 1024 px (N = 4097) | 200 MB | 1800 MB | 9.0 |",
        "| training step, FPT, batch 16 | 500 ms | 1.40 s | 2.8 |",
        "| 0.971 | 0.510 | 0.989 |",
    ):
        assert line in text, line
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "## Machines side by side" in page
    assert "| frozen_pass | 344 ms (4.7×) | 344 ms (4.7×) |" in page
    assert "| float32 | 344 ms | 1.6 s | 4.7 | 2 | – | 50 % |" in page
    assert (tmp_path / "docs" / "figures" / "benchmarks.svg").read_bytes().startswith(b"<?xml")
    again = text
    report.main([str(one), str(other), *where])
    assert readme.read_text() == again


def test_a_page_without_marks_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        report.readme.rewrite(page, [], None)


def test_tiny_sizes_never_reach_the_readme(tmp_path: Path) -> None:
    row = bench("bench_training_step[fpt]", 0.5, method="fpt", plain_seconds=1.4, ratio=2.8)
    results = read_results(write(tmp_path / "a.json", row, sizes="tiny"))
    assert report.readme.render([results], None) == ""


def test_other_json_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text('{"phases": {}}')
    assert not is_results(path)
    with pytest.raises(ValueError, match="device.json must be JSON of `make bench`"):
        read_results(path)


def test_committed_results_are_readable() -> None:
    files = [p for p in (ROOT / "benchmarks" / "results").glob("*.json") if is_results(p)]
    assert files and all(read_results(path).rows for path in files)


def test_what_a_file_lacks_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = {
        **{"plain_seconds": 0.2, "plain_over_ours": 2.0, "GFLOP/s": 0.0},
        **{"peak_added": 0, "plain_peak_added": 1},
    }
    excused = {**whole, "plain_seconds": None, "absent": {"plain_seconds": "26 GB are not free"}}
    rows = [
        bench("bench_read", 0.1, **whole),
        bench("bench_alone", 0.1, **{**whole, "plain_over_ours": None}),
        bench("bench_large", 0.1, **excused),
    ]
    path = write(tmp_path / "a.json", *rows)
    found = complaints(json.loads(path.read_text()), [Path("bench_cache.py"), Path("bench_new.py")])
    assert "benchmarks/bench_cache.py::bench_alone lacks plain_over_ours" in found
    assert "machine_info lacks ceilings" in found and "no row of bench_new.py" in found
    assert not any("bench_read" in line or "bench_large" in line for line in found)
    (tmp_path / "README.md").write_text(f"{START}\n{END}\n")
    report.main(
        [str(path), "--readme", str(tmp_path / "README.md"), "--docs", str(tmp_path / "docs")]
    )
    assert "a.json: benchmarks/bench_cache.py::bench_alone lacks" in capsys.readouterr().err
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| large | float32 | 100 ms | 26 GB are not free | 2 |" in page


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSON of a few real benchmarks at tiny sizes, made as `make bench` makes it."""
    path = tmp_path_factory.mktemp("bench") / "tiny.json"
    files = ("bench_training_step", "bench_side_attention", "bench_quantise_kv")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only"]
    named = [f"benchmarks/{name}.py" for name in files]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, f"--benchmark-json={path}", *named],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return path


def test_a_real_run_says_all_that_it_must(measured: Path) -> None:
    content = json.loads(measured.read_text())
    assert complaints(content) == []
    assert content["sizes"] == "tiny" and content["failed"] == []
    assert content["machine_info"]["packages"]["torch"]
    for row in content["benchmarks"]:
        info = row["extra_info"]
        plain, ours = info["plain_rounds"], row["stats"]["data"]
        assert info["plain_seconds"] == median(plain)
        assert info["plain_over_ours"] == ratio_of_rounds(plain, ours) > 0
        assert info["bytes"] > 0 and info["share_of_floor"] > 0


def test_a_change_of_speed_between_rounds_changes_no_ratio() -> None:
    # Half as fast from the middle of the third round on; the medians are 6 and 4.
    theirs, ours = [6.0, 6.0, 6.0, 12.0, 12.0], [2.0, 2.0, 4.0, 4.0, 4.0]
    assert ratio_of_rounds(theirs, ours) == 3.0
    with pytest.raises(ValueError, match="shorter"):
        ratio_of_rounds(theirs, ours[1:])


def test_a_real_run_becomes_page_plot_and_readme(
    measured: Path, tmp_path: Path, readme: Path
) -> None:
    where = ["--readme", str(readme), "--docs", str(tmp_path / "docs")]
    assert report.main([str(measured), *where]) == 0
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    content = json.loads(measured.read_text())
    names = [row["name"].removeprefix("bench_") for row in content["benchmarks"]]
    assert len(names) > 6 and all(f"| {name} | " in page for name in names)
    assert "training step" not in readme.read_text()  # tiny sizes never reach it
    full = tmp_path / "full.json"
    full.write_text(json.dumps(content | {"sizes": "full"}))
    report.main([str(full), *where])
    assert "| training step, FPT+, batch 16 | " in readme.read_text()


def test_comparison_prints_the_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = write(tmp_path / "base.json", bench("bench_read", 0.2), bench("bench_gone", 1.0))
    head = write(tmp_path / "head.json", bench("bench_read", 0.1), bench("bench_new", 1.0))
    assert report.main(["--compare", str(base), str(head)]) == 0
    out = capsys.readouterr().out
    assert "| read | 200 ms | 100 ms | 2.00 |" in out
    assert "| gone | only in base" in out and "| new | only in head" in out


def test_no_speed_for_a_file_with_a_failed_benchmark(tmp_path: Path) -> None:
    rows = [bench("bench_read", 0.2), bench("bench_step", 0.3, file="bench_training_step.py")]
    base = read_results(write(tmp_path / "base.json", *rows))
    failed = ["benchmarks/bench_cache.py::bench_verify"]
    head = read_results(write(tmp_path / "head.json", *rows, failed=failed))
    lines, is_green = compare(base, head, set())
    text = "\n".join(lines)
    assert not is_green
    assert "RED: benchmarks/bench_cache.py::bench_verify" in text
    assert "| read | withheld: a benchmark of this file failed" in text and "200 ms" not in text
    assert "| step | 300 ms | 300 ms | 1.00 |" in text


def test_no_speed_for_a_red_test_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="tests.cache.test_reader" name="a">'
        '<failure message="x">x</failure></testcase>'
        '<testcase classname="tests.test_config" name="b"/></testsuite></testsuites>'
    )
    assert red_files([junit]) == {"tests/cache/test_reader.py"}
    path = write(tmp_path / "base.json", bench("bench_read", 0.2))
    assert report.main(["--compare", str(path), str(path), "--junit", str(junit)]) == 1
    out = capsys.readouterr().out
    assert "withheld: tests/cache/test_reader.py is red" in out and "200 ms" not in out


@pytest.mark.parametrize(
    ("bench_file", "test_file", "expected"),
    [
        ("benchmarks/bench_cache.py", "tests/cache/test_reader.py", True),
        ("benchmarks/bench_cache_readers.py", "tests/cache/test_writer.py", True),
        ("benchmarks/bench_token_scores.py", "tests/ops/test_token_scores.py", True),
        ("benchmarks/bench_token_scores.py", "tests/gpu/test_token_scores.py", True),
        ("benchmarks/bench_sweep.py", "tests/sweep/test_stack.py", True),
        ("benchmarks/bench_token_scores.py", "tests/ops/test_select_tokens.py", False),
    ],
)
def test_which_tests_a_benchmark_rests_on(bench_file: str, test_file: str, expected: bool) -> None:
    assert is_about(bench_file, test_file) == expected
