"""The GPU tests (``tests/gpu``) by pytest in a process of its own, every outcome kept."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.device.phases import Options
from benchmarks.device.processes import ROOT, environment_of
from benchmarks.device.pytest_log import LOG_VARIABLE
from benchmarks.device.schedule import Item

# Compiling kernels keeps a CPU core busy for longer than the GPU.
_WORKERS = 4


def items(options: Options) -> list[Item]:
    """One run of pytest; a dry run takes one file."""
    return [Item("pytest -m gpu", lambda seconds: run_tests(options, seconds), least=3.0)]


def run_tests(options: Options, seconds: float) -> dict[str, Any]:
    """Numbers, and names and messages of what failed; what was cut off is said."""
    log = options.folder / "gpu-tests.jsonl"
    log.unlink(missing_ok=True)
    place = "tests/gpu/test_select_tokens.py" if options.is_dry else "tests/gpu"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        place,
        "--no-header",
        "--tb=short",
    ]
    command += ["-p", "benchmarks.device.pytest_log", "-p", "no:cacheprovider"]
    if not options.is_dry and importlib.util.find_spec("xdist"):
        command += ["-n", str(_WORKERS)]
    start, code = time.monotonic(), None
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment_of(options.is_dry, {LOG_VARIABLE: str(log)}),
            timeout=seconds,
            capture_output=True,
            text=True,
        )
        code, tail = done.returncode, done.stdout[-2000:] + done.stderr[-2000:]
    except subprocess.TimeoutExpired:
        tail = f"ended after {seconds:.0f} s"
    return {**summary(log), "exit_status": code, "tail": tail, "took": time.monotonic() - start}


def summary(log: Path) -> dict[str, Any]:
    """Of the lines that ``pytest_log`` wrote."""
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    tests = [line for line in lines if "name" in line]
    failed = [{k: t[k] for k in ("name", "message")} for t in tests if t["outcome"] == "failed"]
    passed = [test for test in tests if test["outcome"] == "passed"]
    slowest = sorted(tests, key=lambda test: -test["seconds"])[:10]
    return {
        "collected": max((line.get("collected", 0) for line in lines), default=0),
        "passed": len(passed),
        "failed": failed,
        "slowest": [[test["name"], round(test["seconds"], 2)] for test in slowest],
    }
