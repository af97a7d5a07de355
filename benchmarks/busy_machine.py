"""A training step on a machine that does something else too, by how OpenMP's threads wait.

    python -m benchmarks.busy_machine --write

The FPT+ step of ``bench_training_step.py`` with a thread a core, while the machine idles and beside
as many busy processes as it has cores; ``OMP_WAIT_POLICY`` as it is where nobody sets it, and
``passive``.  The settings take turns, each round in a process of its own, since OpenMP reads the
setting once.  ``--write`` puts medians into benchmarks/results/busy_machine.json and
docs/training-speed.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.marked_block import Published
from benchmarks.turns import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "busy_machine.json"
DOCUMENT = ROOT / "docs" / "training-speed.md"
START = "<!-- busy: written by benchmarks/busy_machine.py -->"
END = "<!-- end of busy -->"
POLICIES = ("not set", "passive")
PRECISIONS = ("float32", "bfloat16")


def steps(full: bool, count: int) -> dict[str, list[float]]:
    """Seconds of ``count`` steps in this process, by precision."""
    from benchmarks.bench_training_step import steps_of

    seconds: dict[str, list[float]] = {}
    for precision in PRECISIONS:
        torch.manual_seed(0)
        step, _, _ = steps_of("fpt_plus", full, precision=precision)
        step()
        seconds[precision] = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            seconds[precision].append(time.perf_counter() - start)
    return seconds


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Beside ``processes`` that do nothing but work."""
    others = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)
    ]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measure(*, full: bool, count: int, rounds: int) -> dict[str, Any]:
    """Median seconds of a step by what else runs, policy and precision."""
    cores = os.cpu_count() or 1
    found: dict[tuple[int, str, str], list[float]] = {}
    for _ in range(rounds):
        for others in (0, cores):
            for policy in POLICIES:
                with busy(others):
                    seconds = _steps_elsewhere(policy, full, count)
                for precision, times in seconds.items():
                    found.setdefault((others, policy, precision), []).extend(times)
    return {
        "machine": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "full": full,
        "steps": count * rounds,
        "rows": [
            {
                "others": others,
                "policy": policy,
                "precision": precision,
                "seconds": statistics.median(times),
            }
            for (others, policy, precision), times in found.items()
        ],
    }


def _steps_elsewhere(policy: str, full: bool, count: int) -> dict[str, list[float]]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    environment.pop("OMP_WAIT_POLICY", None)
    if policy != "not set":
        environment["OMP_WAIT_POLICY"] = policy
    words = [sys.executable, "-m", "benchmarks.busy_machine", "--steps", str(count), "--here"]
    done = subprocess.run(
        [*words, *([] if full else ["--tiny"])],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    seconds: dict[str, list[float]] = json.loads(done.stdout)
    return seconds


def render(found: dict[str, Any]) -> str:
    """The block of the document."""
    lines = [
        f"FPT+ on ViT-B, 512 px, batch 16, {found['threads']} threads on {found['cores']} cores of "
        f"{found['machine']}, no GPU; medians of {found['steps']} steps:",
        "",
        "| beside | `--precision` | `OMP_WAIT_POLICY` not set, ms | `passive`, ms |",
        "| --- | --- | --- | --- |",
    ]
    seconds = {
        (row["others"], row["precision"], row["policy"]): row["seconds"] for row in found["rows"]
    }
    for others, precision in dict.fromkeys(key[:2] for key in seconds):
        beside = f"{others} busy processes" if others else "nothing"
        times = [f"{1e3 * seconds[others, precision, policy]:.0f}" for policy in POLICIES]
        lines.append(f"| {beside} | {precision} | {' | '.join(times)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=15, help="in a process")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--here", action="store_true", help="steps in this process, by themselves")
    given = parser.parse_args(arguments)
    if given.write and given.tiny:
        parser.error("--write is for the full size; leave out --tiny")
    if given.here:
        sys.stdout.write(json.dumps(steps(not given.tiny, given.steps)))
        return 0
    found = measure(full=not given.tiny, count=given.steps, rounds=given.rounds)
    if given.write:
        Published(RESULTS, DOCUMENT, START, END, render).write(found)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
