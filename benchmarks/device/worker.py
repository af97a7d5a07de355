"""The process that uses the GPU: runs what a report has not settled yet, and leaves when broken.

``python -m benchmarks.device.worker REPORT DEADLINE``; started by ``benchmarks.device``, which
starts another one where this one dies, so that one bad kernel costs one item.
"""

import sys
from pathlib import Path

import torch

from benchmarks.device.phases import Options, phases
from benchmarks.device.report import Report
from benchmarks.device.schedule import run_phases

BROKEN = 75


def is_broken() -> bool:
    """Whether the CUDA context is lost: an illegal access makes every later call fail."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.zeros(1, device="cuda").item()
    except RuntimeError:
        return True
    return False


def main(arguments: list[str]) -> int:
    """0 where all is settled or time is out, ``BROKEN`` where a new process must go on."""
    path, deadline = Path(arguments[0]), float(arguments[1])
    report = Report.load(path)
    options = Options(
        is_dry=report.content["dry_run"],
        wanted=tuple(report.content["wanted"]),
        folder=path.parent,
        report=report,
    )
    return 0 if run_phases(report, phases(options), deadline, is_broken) else BROKEN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
