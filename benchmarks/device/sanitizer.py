"""compute-sanitizer over every kernel once, on small shapes: memcheck and racecheck."""

import re
import shutil
import subprocess
import sys
from typing import Any

from benchmarks.device.phases import Options
from benchmarks.device.processes import ROOT, environment_of
from benchmarks.device.schedule import Item, OutOfTime
from benchmarks.device.small_calls import call_all

TOOLS = ("memcheck", "racecheck")
_PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")


def items(options: Options) -> list[Item]:
    """The calls by themselves, which also fills Triton's cache, then each tool over them."""
    calls = Item("calls", lambda _: {"calls": call_all(options.device)})
    tools = [Item(t, lambda seconds, t=t: check(options, t, seconds), least=3.0) for t in TOOLS]  # type: ignore[misc]
    return [calls, *tools]


def check(options: Options, tool: str, seconds: float) -> dict[str, Any]:
    """Number of errors, and the summary line; where the tool is not installed, that."""
    found = next(filter(None, map(shutil.which, _PLACES)), None)
    if found is None or options.is_dry:
        return {"errors": None, "summary": "compute-sanitizer is not installed or not used here"}
    command = [found, "--tool", tool, sys.executable, "-m", "benchmarks.device.small_calls"]
    # Tensors of their own allocations, so that one past the end is past an allocation.
    variables = environment_of(False, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, timeout=seconds, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        raise OutOfTime(f"{seconds:.0f} s were not enough") from None
    return outcome(done.stdout + done.stderr, done.returncode)


def outcome(text: str, exit_status: int) -> dict[str, Any]:
    """Read the tool's summary; no summary is an error of its own."""
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?).*", text)
    if summary is None or exit_status != 0:
        raise RuntimeError(f"exit status {exit_status}: {text[-1500:]}")
    errors = int(summary[1])
    # Past the banner; enough to see the first complaint.
    return {"errors": errors, "summary": summary[0], "output": text[:4000] if errors else ""}
