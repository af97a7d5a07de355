"""Bars, exit status and tables of ``benchmarks.device``, from made-up measurements."""

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import counts
from benchmarks.cases import FULL_PROMPT_CASES, GPU_FROZEN_CASES
from benchmarks.device.bars import bars, failures, unproven
from benchmarks.device.phases import SHARES
from benchmarks.device.report import Report
from benchmarks.device.tables import markdown

SCORES = "token_scores, log-sum-exp given vit_b_512px_x16 bfloat16"
PROMPT = "prompt_attention, backward fpt_plus_vit_b_512px bfloat16 int8"
BF16 = torch.bfloat16
COPY = 4.0e12


def put(report: Report, phase: str, item: str, result: dict[str, Any]) -> None:
    report.start(phase, item, kill_at=0.0)
    report.settle("done", result=result)


def op_row(count: counts.Count, seconds: float, peak: int = 0) -> dict[str, Any]:
    return {
        "impl": "triton",
        "group": "",
        "case": "",
        "dtype": "bfloat16",
        "seconds": seconds,
        "eager_seconds": seconds,
        "peak_added": peak,
        "bytes": count.bytes,
        "out_bytes": count.out_bytes,
        "flops": count.flops,
        "exponentials": count.exponentials,
        "gb_per_s": count.bytes / seconds / 1e9,
        "tflop_per_s": count.flops / seconds / 1e12,
        "share_of_floor": 0.5,
        "plain_seconds": 3 * seconds,
        "plain_over_ours": 3.0,
    }


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """A run on a GPU in which nothing was measured yet but the ceilings."""
    made = Report.create(
        tmp_path / "r.json", commit="abc", dry_run=False, wanted=list(SHARES), minutes=9.0
    )
    put(made, "environment", "ceilings", {"bandwidth": COPY, "flops": {}, "exponentials": 1.0})
    return made


def verdict(report: Report, name: str) -> tuple[bool | None, float | None, float | None]:
    [bar] = [bar for bar in bars(report) if bar["name"] == name]
    return bar["met"], bar["value"], bar["limit"]


@pytest.mark.parametrize(("micros", "met"), [(102.0, True), (103.0, False)])
def test_token_scores_in_twice_its_floor_of_51_microseconds(
    report: Report, micros: float, met: bool
) -> None:
    count = counts.token_scores(GPU_FROZEN_CASES[0], BF16, passes=1)
    put(report, "ops", SCORES, op_row(count, micros * 1e-6))
    found, value, limit = verdict(report, f"{SCORES}: time")
    assert found is met and value == pytest.approx(micros) and limit == pytest.approx(102.4)


@pytest.mark.parametrize(("more", "met"), [(0, True), (1, False)])
def test_memory_within_results_and_16_megabytes(report: Report, more: int, met: bool) -> None:
    count = counts.token_scores(GPU_FROZEN_CASES[0], BF16, passes=1)
    peak = 16 * 12 * 1025 * 4 + (16 << 20) + more
    put(report, "ops", SCORES, op_row(count, 1e-4, peak))
    assert verdict(report, f"{SCORES}: memory")[0] is met


@pytest.mark.parametrize(("share", "met"), [(0.81, True), (0.79, False)])
def test_prompt_attention_at_80_percent_of_the_measured_copy(
    report: Report, share: float, met: bool
) -> None:
    count = counts.prompt_attention(FULL_PROMPT_CASES[0], BF16, torch.int8, False, True)
    put(report, "ops", PROMPT, op_row(count, count.bytes / (share * COPY)))
    found, value, limit = verdict(report, f"{PROMPT}: rate")
    assert found is met and limit == pytest.approx(3200) and value == pytest.approx(4000 * share)


def test_select_tokens_at_70_percent(report: Report) -> None:
    name = "select_tokens vit_b_512px_x16 bfloat16"
    count = counts.select_tokens(GPU_FROZEN_CASES[0], BF16, torch.float16)
    put(report, "ops", name, op_row(count, count.bytes / (0.71 * COPY)))
    assert verdict(report, f"{name}: rate")[0] is True


def test_models(report: Report) -> None:
    put(report, "models", "a", {"seconds": 1.0, "images_per_s": 1900.0})
    assert verdict(report, "frozen pass, bf16")[:2] == (False, 1900.0)
    put(report, "models", "b", {"seconds": 1.0, "images_per_s": 2100.0})
    put(report, "models", "c", {"seconds": 1.0, "timm_images_per_s": 5000.0})
    assert verdict(report, "frozen pass, bf16")[:2] == (True, 2100.0)


def step_row(seconds: float, peak: float) -> dict[str, Any]:
    return {"seconds": seconds, "launches": 4.0, "peak": peak, "share_of_floor": 0.1}


def test_steps_by_their_fastest_way(report: Report) -> None:
    """Of the ways of launching the best counts; beside it the plain step of another phase."""
    resident, disk = "step fpt_plus x16 resident", "step fpt_plus x16 disk: peak memory"
    put(report, "steps", f"{resident} eager", step_row(4e-3, 3e8))
    assert verdict(report, resident)[0] is False
    put(report, "steps", f"{resident} graph", step_row(0.4e-3, 3e8))
    put(report, "steps", "step fpt_plus x64 resident graph", step_row(0.1e-3, 3e8))
    assert verdict(report, resident) == (True, pytest.approx(0.4), 0.5)
    assert verdict(report, f"{resident}: plain / ours")[:2] == (None, None)
    put(report, "models", "training step fpt_plus", {"seconds": 1e-3, "plain_seconds": 9e-3})
    assert verdict(report, f"{resident}: plain / ours")[:2] == (True, pytest.approx(22.5))
    put(report, "steps", "step fpt_plus x16 disk graph", step_row(1e-3, 201e6))
    assert verdict(report, disk) == (False, pytest.approx(201.0), 200.0)
    put(report, "steps", "step fpt x16 disk graph", step_row(1e-3, 499e6))
    assert verdict(report, "step fpt x16 disk: peak memory")[0] is True
    assert "| step fpt_plus x16 resident graph | 400 µs | 4 | 300.0 MB | 10 % |" in markdown(report)


def test_what_was_not_measured_is_neither_met_nor_missed(report: Report) -> None:
    assert {bar["met"] for bar in bars(report)} == {None}
    assert markdown(report).count("not measured") == len(bars(report))


def complete(report: Report) -> None:
    """Every proof ran and holds."""
    tests = {"collected": 2, "passed": 2, "failed": [], "exit_status": 0, "tail": ""}
    put(report, "gpu_tests", "pytest", tests)
    put(report, "races", "x", {"impl": "triton", "repeats": 250, "differing": 0})
    for tool in ("memcheck", "racecheck"):
        put(report, "sanitizer", tool, {"errors": 0, "summary": "0 errors"})


def test_proofs_that_hold(report: Report) -> None:
    assert unproven(report) == [f"{x}: not reached" for x in ("gpu_tests", "races", "sanitizer")]
    complete(report)
    assert failures(report) == [] == unproven(report)


@pytest.mark.parametrize(
    ("phase", "item", "change", "why"),
    [
        ("gpu_tests", "pytest", {"failed": [{"name": "t", "message": "bad"}]}, "t: bad"),
        ("gpu_tests", "pytest", {"exit_status": 3, "tail": "internal"}, "ended with 3"),
        ("races", "x", {"differing": 4}, "4 of 250 repeats differ"),
        ("sanitizer", "memcheck", {"errors": 2, "summary": "2 errors"}, "2 errors"),
    ],
)
def test_a_proof_that_fails_is_named(
    report: Report, phase: str, item: str, change: dict[str, Any], why: str
) -> None:
    complete(report)
    report.items(phase)[item]["result"].update(change)
    [complaint] = failures(report)
    assert complaint.startswith(phase) and why in complaint


def test_a_failed_benchmark_and_an_unfinished_test_run_are_named(report: Report) -> None:
    complete(report)
    report.start("ops", "wrong", kill_at=0.0)
    report.settle("failed", why="AssertionError: wrong result")
    assert failures(report) == ["ops: wrong: failed: AssertionError: wrong result"]
    report.items("gpu_tests")["pytest"]["result"].update(collected=9, exit_status=None)
    report.plan("races", ["y"])
    assert unproven(report) == ["races: y: not run", "gpu_tests: pytest: 2 of 9 tests ran"]
    assert "- ops: wrong: failed: AssertionError: wrong result" in markdown(report)


def test_tables_hold_every_row(report: Report) -> None:
    complete(report)
    count = counts.token_scores(GPU_FROZEN_CASES[0], BF16, passes=1)
    put(report, "ops", SCORES, op_row(count, 80e-6, 1 << 20))
    rivals = {"torch.compile": {"seconds": 1.6e-4, "over_ours": 2.0}, "x": {"seconds": None}}
    put(report, "rivals", SCORES, {"ours": 80e-6, "rivals": rivals})
    tuned = {
        "kernel": "token_scores_columns",
        "dtype": "bfloat16",
        "padded": 64,
        "architecture": "sm_90",
        "present": [64, 128, 4, 3, 1e-4],
        "best": [64, 64, 4, 3, 8e-5],
        "gain": 1.25,
        "row": "Tile(64, 64, 4, 3)",
        "tried": [[]],
        "failed": [],
        "not_tried": 7,
    }
    put(report, "tuning", SCORES, tuned)
    text = markdown(report)
    assert f"| {SCORES} | triton | 80 µs | 80 µs | 240 µs | 3 |" in text
    assert f"| {SCORES}: time | 80 | ≤ 102 µs | met |" in text
    assert f"| {SCORES} | torch.compile | 80 µs | 160 µs | 2 |" in text
    assert "| Tile(64, 128, 4, 3) | 100 µs | Tile(64, 64, 4, 3) | 80 µs | 1.25 |" in text
    assert "- models: not reached" in text and "0 of 250 repeats of 1 calls differ" in text
