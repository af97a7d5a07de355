"""``benchmarks.device`` without a GPU: its time budget, what survives a kill, a whole dry run."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.device import __main__ as device
from benchmarks.device.gpu_tests import summary
from benchmarks.device.phases import SHARES
from benchmarks.device.processes import environment_of
from benchmarks.device.report import Report
from benchmarks.device.sanitizer import outcome
from benchmarks.device.schedule import Item, OutOfTime, Phase, phase_seconds, run_phases
from benchmarks.device.tuning import candidates, share
from fpt_fast.ops import implementation
from fptkernels import launch_table
from fptkernels.launch_table import Tile
from helpers import ROOT


class Clock:
    """Time that passes only when an item says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def item(self, name: str, takes: float, least: float = 1.0) -> Item:
        def run(seconds: float) -> dict[str, Any]:
            self.now += takes
            return {"seconds_given": seconds}

        return Item(name, run, least)


def new_report(path: Path, **settings: Any) -> Report:
    fixed = {"commit": "abc", "dry_run": False, "wanted": ["a", "b"], "minutes": 9.0}
    return Report.create(path / "r.json", **{**fixed, **settings})


def states(report: Report, phase: str) -> dict[str, str]:
    return {name: item["state"] for name, item in report.items(phase).items()}


def test_unused_time_moves_on() -> None:
    assert phase_seconds(100, [1, 3]) == 25
    assert phase_seconds(90, [3]) == 90
    assert phase_seconds(-5, [1, 1]) == 0


def test_a_phase_keeps_to_its_share_and_names_what_did_not_fit(tmp_path: Path) -> None:
    clock, report = Clock(), new_report(tmp_path)
    slow = [clock.item(f"slow {i}", takes=20) for i in range(4)]
    quick = [clock.item("quick", takes=1), clock.item("needs 61", takes=1, least=61)]
    phases = [Phase("a", 1, lambda: slow), Phase("b", 1, lambda: quick)]
    assert run_phases(report, phases, deadline=1100, clock=clock)
    # 50 s: the third starts with 10 s left, the fourth after the end; b has what a left.
    assert list(states(report, "a").values()) == ["done", "done", "done", "not run"]
    assert report.items("a")["slow 3"]["why"] == "no time was left"
    assert dict(report.results("b"))["quick"]["seconds_given"] == pytest.approx(40)
    assert states(report, "b") == {"quick": "done", "needs 61": "not run"}
    on_disk = Report.load(report.path)
    assert on_disk.content["phases"] == report.content["phases"]
    assert report.count() == {"done": 4, "not run": 2}


def test_an_item_that_needs_more_time_is_not_run_and_may_be_resumed(tmp_path: Path) -> None:
    clock, report = Clock(), new_report(tmp_path)

    def hurry(_: float) -> Any:
        raise OutOfTime("9 s were not enough")

    assert run_phases(report, [Phase("a", 1, lambda: [Item("x", hurry)])], 1100, clock=clock)
    assert states(report, "a") == {"x": "not run"}
    assert report.items("a")["x"]["why"] == "9 s were not enough"
    assert run_phases(report, [Phase("a", 1, lambda: [clock.item("x", 1)])], 1100, clock=clock)
    assert states(report, "a") == {"x": "done"}


def test_tuning_divides_its_time() -> None:
    assert (share(60, 6), share(60, 2), share(60, 1)) == (20, 60, 60)


def test_a_failed_item_and_a_failed_list_cost_themselves_alone(tmp_path: Path) -> None:
    clock, report = Clock(), new_report(tmp_path)

    def fail(*_: object) -> Any:
        raise RuntimeError("out of shared memory")

    phases = [Phase("a", 1, fail), Phase("b", 1, lambda: [Item("x", fail), clock.item("y", 1)])]
    assert run_phases(report, phases, deadline=1100, clock=clock)
    assert states(report, "a") == {"listing its items": "failed"}
    assert states(report, "b") == {"x": "failed", "y": "done"}
    assert report.items("b")["x"]["why"] == "RuntimeError: out of shared memory"


def test_a_lost_device_asks_for_a_new_process(tmp_path: Path) -> None:
    clock, report = Clock(), new_report(tmp_path)

    def crash(_: float) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    phases = [Phase("a", 1, lambda: [Item("bad", crash), clock.item("next", 1)])]
    assert not run_phases(report, phases, 1100, is_broken=lambda: True, clock=clock)
    assert states(report, "a") == {"bad": "failed", "next": "not run"}
    assert run_phases(report, phases, 1100, is_broken=lambda: True, clock=clock)
    assert states(report, "a") == {"bad": "failed", "next": "done"}


WORKER = """
import os, signal, sys, time
from pathlib import Path
from benchmarks.device.report import Report
from benchmarks.device.schedule import Item, Phase, run_phases
def note(name):
    with Path(sys.argv[2]).open("a") as file:
        file.write(name + " ")
    return {}
def die(_):
    note("dies")
    os.kill(os.getpid(), signal.SIGKILL)
def hang(_):
    note("hangs")
    time.sleep(600)
items = [Item("one", lambda _: note("one")), Item("dies", die), Item("hangs", hang),
         Item("last", lambda _: note("last"))]
report = Report.load(Path(sys.argv[1]))
run_phases(report, [Phase("a", 1, lambda: items)], time.time() + 100)
"""


def test_a_killed_and_a_hung_process_lose_one_item_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, calls = new_report(tmp_path), tmp_path / "calls"

    def start() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", WORKER, str(report.path), str(calls)]
        return subprocess.Popen(command, cwd=ROOT, env=environment_of(True), start_new_session=True)

    # The hanging item's time is over as soon as it runs.
    monkeypatch.setattr(
        device,
        "_is_overdue",
        lambda path, now: (
            (Report.load(path).content["running"] or {}).get("item") == "hangs"
            and "hangs" in calls.read_text()
        ),
    )
    assert device.supervise(report.path, deadline=float("inf"), start=start) == 2
    report = Report.load(report.path)
    assert states(report, "a") == {
        "one": "done",
        "dies": "killed",
        "hangs": "killed",
        "last": "done",
    }
    assert report.items("a")["dies"]["why"] == "its process ended: -9"
    assert "outran its time" in report.items("a")["hangs"]["why"]
    assert calls.read_text().split() == ["one", "dies", "hangs", "last"]


def test_an_item_is_overdue_after_its_time(tmp_path: Path) -> None:
    report = new_report(tmp_path)
    assert not device._is_overdue(report.path, 1e12)
    report.start("a", "x", kill_at=50.0)
    assert not device._is_overdue(report.path, 49.0)
    assert device._is_overdue(report.path, 51.0)


def test_resume_goes_on_behind_what_was_running(tmp_path: Path) -> None:
    settings = {"commit": "abc", "dry_run": False, "wanted": ["a"], "minutes": 5.0}
    report = new_report(tmp_path)
    report.plan("a", ["one", "two"])
    report.start("a", "one", kill_at=0.0)
    resumed = device.opened(None, report.path, settings)
    assert states(resumed, "a") == {"one": "killed", "two": "not run"}
    assert resumed.content["minutes"] == 5.0 and resumed.content["running"] is None
    with pytest.raises(SystemExit, match="another commit or kind of run"):
        device.opened(None, report.path, {**settings, "dry_run": True})
    with pytest.raises(SystemExit, match="another commit or kind of run"):
        device.opened(None, report.path, {**settings, "commit": "abd"})
    report.path.write_text('{"format": 0}')
    with pytest.raises(ValueError, match="format 1, got 0"):
        device.opened(None, report.path, settings)


def test_a_report_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = new_report(tmp_path)
    before = report.path.read_text()

    def fail(*_: object) -> Any:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        report.finish()
    assert report.path.read_text() == before


def test_a_cut_off_test_run_keeps_its_outcomes(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    test = {"seconds": 0.5, "message": ""}
    lines = [
        {"collected": 5},
        {**test, "name": "a", "outcome": "passed"},
        {**test, "name": "b", "outcome": "failed", "message": "wrong"},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = summary(log)
    assert (found["collected"], found["passed"]) == (5, 1)
    assert found["failed"] == [{"name": "b", "message": "wrong"}]
    assert summary(tmp_path / "none")["collected"] == 0


def test_the_sanitizers_summary_is_read() -> None:
    text = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
    assert outcome(text, 0) == {"errors": 0, "summary": "ERROR SUMMARY: 0 errors", "output": ""}
    races = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)"
    assert outcome(races, 0)["errors"] == 2
    with pytest.raises(RuntimeError, match="exit status 1"):
        outcome("========= Error: Device not supported", 1)
    with pytest.raises(RuntimeError, match="exit status 0"):
        outcome("nothing", 0)


def test_an_overridden_row_lasts_as_long_as_its_block() -> None:
    key = ("token_scores_rows", torch.float16, 64)
    before = launch_table.tile(*key, torch.device("cpu"))
    with (
        pytest.raises(RuntimeError, match="inside"),
        launch_table.overridden(*key, Tile(16, 16, 1, 1)),
    ):
        assert launch_table.tile(*key, torch.device("cpu")) == Tile(16, 16, 1, 1)
        raise RuntimeError("inside")
    assert launch_table.tile(*key, torch.device("cpu")) == before


@pytest.mark.parametrize("kernel", sorted({key[0] for key in launch_table.TABLE}))
def test_candidates_of_every_kernel_stand_nearest_first(kernel: str) -> None:
    present = next(row for key, row in launch_table.TABLE.items() if key[0] == kernel)
    rows = candidates(kernel, present)
    assert present not in rows and len(set(rows)) == len(rows) >= 10
    assert all(row.block_m >= 16 and row.block_n >= 16 for row in rows)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The whole script, tiny and interpreted: its exit status, its report, what it printed."""
    out = tmp_path_factory.mktemp("device")
    command = [sys.executable, "-m", "benchmarks.device", "--dry-run", "--out", str(out / "d.json")]
    # It runs a pytest of its own, which is no worker of the one that runs this test.
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT / "python"), str(ROOT)])
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    log = (out / "device-worker.log").read_text()
    return lambda: (done, Report.load(out / "d.json"), log)


@pytest.mark.slow
def test_a_dry_run_runs_everything(dry_run: Callable[..., Any]) -> None:
    done, report, log = dry_run()
    assert done.returncode == 0, done.stdout + done.stderr + log
    content = report.content
    assert list(content["phases"]) == list(SHARES) and content["restarts"] == 0
    assert set(report.count()) == {"done"} and content["running"] is None
    assert content["failures"] == [] == content["unproven"]
    ceilings = dict(report.results("environment"))["ceilings"]
    assert all(rate > 0 for rate in (ceilings["bandwidth"], ceilings["exponentials"]))
    assert all(row["passed"] == row["collected"] > 0 for _, row in report.results("gpu_tests"))
    assert all(row["differing"] == 0 for _, row in report.results("races"))
    assert dict(report.results("sanitizer"))["calls"]["calls"] == len(report.items("races"))
    assert all(bar["met"] is None for bar in content["bars"])


@pytest.mark.slow
def test_a_dry_run_reaches_every_op_by_its_kernel(dry_run: Callable[..., Any]) -> None:
    _, report, _ = dry_run()
    kernels = [op for op in implementation.ops() if "triton" in implementation.implementations(op)]
    families = {op.removesuffix("_backward") for op in kernels}
    for phase in ("races", "ops"):
        results = list(report.results(phase))
        assert {row["impl"] for _, row in results} == {"triton"}
        reached = {name.split()[0].rstrip(",") for name, _ in results}
        assert reached == families, phase
    for _, row in report.results("ops"):
        assert row["seconds"] > 0 and row["plain_over_ours"] > 0 and row["bytes"] > 0
        assert row["share_of_floor"] == pytest.approx(row["floor_seconds"] / row["seconds"])
    found = {rival for _, row in report.results("rivals") for rival in row["rivals"]}
    assert {"torch.compile", "flex_attention", "key_major_32x32"} <= found
    for _, row in report.results("rivals"):
        assert all(rival["seconds"] for rival in row["rivals"].values()), row
    rows = [row for _, row in report.results("tuning") if row["kernel"]]
    assert rows and all(row["row"].startswith("Tile(") and row["gain"] >= 1 for row in rows)
    assert {name.split()[0] for name, _ in report.results("models")} == {"frozen", "training"}
    steps = dict(report.results("steps"))
    assert {row["tier"] for row in steps.values()} == {"resident", "disk", "pinned"}
    assert {row["way"] for row in steps.values()} == {"graph", "eager", "compiled graph"}
    assert all(row["seconds"] > 0 and row["batch"] > 0 for row in steps.values())
