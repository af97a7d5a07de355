"""Processes that a run starts: their environment, and their end."""

import os
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def environment_of(is_dry: bool, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This package's sources in front, kernels interpreted in a dry run and compiled elsewhere."""
    places = [
        str(ROOT / "python"),
        str(ROOT),
        str(ROOT / "tests"),
        os.environ.get("PYTHONPATH", ""),
    ]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "PYTHONUNBUFFERED": "1",
        "TRITON_INTERPRET": "1" if is_dry else "0",
        **({"OMP_NUM_THREADS": "1"} if is_dry else {}),
        **(more or {}),
    }


def end(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process that was started in a session of its own, and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
