"""Run everything that needs a GPU, within a time, into one JSON file."""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.device.bars import bars, failures, unproven
from benchmarks.device.phases import SHARES
from benchmarks.device.processes import ROOT, end, environment_of
from benchmarks.device.report import Report
from benchmarks.device.tables import markdown

MAX_RESTARTS = 12
POLL_SECONDS = 0.2
# Of the whole time, kept for the summary.
_LAST_SECONDS = 5.0


def main() -> int:
    """0 where all proofs hold, 1 where one failed, 2 where one did not run to its end."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--out", type=Path, help="a .json file, or a folder for one")
    parser.add_argument("--phases", default=",".join(SHARES), help="some of %(default)s")
    parser.add_argument("--resume", type=Path, help="go on with the JSON of an earlier run")
    parser.add_argument("--commit", help="what is checked out, where git cannot tell")
    parser.add_argument(
        "--dry-run", action="store_true", help="tiny shapes on the CPU, kernels interpreted"
    )
    given = parser.parse_args()
    wanted = [name for name in given.phases.split(",") if name]
    if unknown := sorted(set(wanted) - set(SHARES)):
        parser.error(f"--phases must be of {', '.join(SHARES)}, got {', '.join(unknown)}")
    deadline = time.time() + given.minutes * 60 - (0 if given.dry_run else _LAST_SECONDS)
    settings = {
        "commit": given.commit or commit(),
        "dry_run": given.dry_run,
        "wanted": wanted,
        "minutes": given.minutes,
    }
    report = opened(given.out, given.resume, settings)
    command = [sys.executable, "-m", "benchmarks.device.worker", str(report.path), str(deadline)]
    with (report.path.parent / "device-worker.log").open("ab") as log:
        restarts = supervise(
            report.path,
            deadline,
            lambda: subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment_of(given.dry_run),
                stdout=log,
                stderr=log,
                start_new_session=True,
            ),
        )
    report = Report.load(report.path)
    failed, missing = failures(report), unproven(report)
    report.finish(bars=bars(report), failures=failed, unproven=missing, restarts=restarts)
    print(markdown(report))
    print(f"\n{report.path}: {json.dumps(report.count())}")
    return 1 if failed else 2 if missing else 0


def opened(out: Path | None, resume: Path | None, settings: dict[str, Any]) -> Report:
    """The report to go on with, or a new one."""
    if resume is not None:
        report = Report.load(resume.resolve())
        if any(report.content[key] != settings[key] for key in ("dry_run", "commit")):
            raise SystemExit(f"{resume} is of another commit or kind of run: start a new one")
        report.settle("killed", why="its process ended while this ran")
        report.content.update(settings, finished=None)
        report.save()
        return report
    path = out or ROOT / "benchmarks" / "results"
    if path.suffix != ".json":
        day = time.strftime("%Y-%m-%d", time.gmtime())
        path = path / f"{'dry-run' if settings['dry_run'] else device_name()}-{day}.json"
    return Report.create(path.resolve(), **settings)


def supervise(
    path: Path,
    deadline: float,
    start: Callable[[], "subprocess.Popen[bytes]"],
    clock: Callable[[], float] = time.time,
) -> int:
    """Run workers until one says that all is done; returns how many had to follow the first.

    What a worker was at when it died, or was ended because it outran its time, is settled as
    killed, and the next one goes on behind it.
    """
    for restarts in range(MAX_RESTARTS):
        process = start()
        try:
            while process.poll() is None and not _is_overdue(path, clock()):
                time.sleep(POLL_SECONDS)
            why = "it outran its time and was ended" if process.poll() is None else None
        finally:
            end(process)
        if process.returncode == 0:
            return restarts
        Report.load(path).settle("killed", why=why or f"its process ended: {process.returncode}")
        if clock() >= deadline:
            return restarts
    return MAX_RESTARTS


def _is_overdue(path: Path, now: float) -> bool:
    running = Report.load(path).content["running"]
    return running is not None and now > running["kill_at"]


def device_name() -> str:
    """The GPU's name for a file, without taking the GPU."""
    if shutil.which("nvidia-smi") is None:
        raise SystemExit(
            "make device needs an NVIDIA GPU (there is no nvidia-smi); see docs/gpu.md"
        )
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    name = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia ")).strip("-")


def commit() -> Any:
    """What is checked out; None outside a repository."""
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    command += ["describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    sys.exit(main())
