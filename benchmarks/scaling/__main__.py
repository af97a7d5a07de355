"""Measure the scaling curves, and draw them: time and memory, ours and the plain one.

``python -m benchmarks.scaling`` measures at the published sizes into
benchmarks/results/scaling.json and draws docs/scaling.md; ``--small`` takes tiny models and
minutes; ``--plot`` draws what was measured.  A curve that is in the file already is kept unless it
is named by ``--only``.  After ``--minutes`` no further size is begun; what is left out is named.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.scaling.curves import CURVES
from benchmarks.scaling.page import write_page
from benchmarks.turns import processor

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """Measure and draw; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="*", choices=CURVES, help="these curves, anew")
    parser.add_argument("--minutes", type=float, default=12.0, help="(default 12)")
    parser.add_argument("--small", action="store_true", help="tiny models, few sizes")
    parser.add_argument("--plot", action="store_true", help="draw only")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/scaling.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    given = parser.parse_args(arguments)
    if not given.plot:
        names = given.only or list(CURVES)
        measure(given.results, names, small=given.small, minutes=given.minutes)
    elif not given.results.exists():
        parser.error(f"{given.results} does not exist; measure first, without --plot")
    write_page(json.loads(given.results.read_text(encoding="utf-8")), given.docs)
    return 0


def measure(path: Path, names: list[str], *, small: bool, minutes: float) -> None:
    """Measure the named curves; the file is written after each, and keeps the others."""
    end = time.monotonic() + 60 * minutes
    results = _head(small)
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        same = ("machine", "cores", "torch", "small")
        if all(before[key] == results[key] for key in same):
            results["points"] = [p for p in before["points"] if p["curve"] not in names]
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in names:
        curve = CURVES[name]
        started = time.monotonic()
        for size in curve.sizes[small]:
            if time.monotonic() > end:
                print(f"{name} of {size:g} is left out: {minutes:g} minutes are over", flush=True)
                continue
            results["points"] += [asdict(point) for point in curve.measure(size, small)]
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _head(small: bool) -> dict[str, Any]:
    """The machine, without its name."""
    described = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True
    )
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": described.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "small": small,
        "points": [],
    }


if __name__ == "__main__":
    sys.exit(main())
