"""The attack on the cache, by parts, each with a count: a short form for CI, a long one by hand.

``make reliability`` runs this file; it writes what was counted, with machine and commit, to
``benchmarks/results/reliability.json``.  Each part runs in a process of its own, fresh and without
other threads.  A promise that does not hold is an exception, so the silent errors of a finished run
are 0.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
REPOSITORY = TESTS.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "reliability.json"


@dataclass(frozen=True)
class Part:
    """One kind of attack: what its count is, in CI and in the long form, and what one costs."""

    name: str
    option: str
    short: int
    long: int
    help: str


PARTS = (
    Part("kills", "kills", 8, 200, "kills at random instants, for each dtype"),
    Part("steps", "stride", 24, 1, "kill at every so-many-th step of the write protocol"),
    Part("processes", "rounds", 3, 100, "builds by two processes, and under readers' eyes"),
    Part("power", "states", 4, 300, "states of an instant above which they are sampled"),
    Part("faults", "faults", 7, 1, "let every so-many-th call fail"),
    Part("flips", "flips", 97, 1, "flip a bit of every so-many-th byte of shards; 1: every bit"),
    Part("fuzz", "inputs", 4000, 1_000_000, "lying manifests, plans, shards, journals, by dtype"),
    Part("soak", "megabytes", 80, 1536, "epochs over a cache of so many MiB, memory limited"),
)


def run_here(name: str, root: Path, dtype: str, count: int) -> dict[str, int]:
    """Run a part in this process; its counts."""
    from reliability import faults, flips, fuzz, kills, processes, replay, soak
    from reliability.subjects import Subject, scenarios

    subject = Subject(root, dtype)
    # Made before anything forks.
    ways = list(scenarios(subject).values())
    _ = subject.features, subject.large_bytes

    def sum_of(counts: list[dict[str, int]]) -> dict[str, int]:
        return {key: sum(one.get(key, 0) for one in counts) for one in counts for key in one}

    runs: dict[str, Callable[[], dict[str, int]]] = {
        "kills": lambda: kills.random_kills(subject, root, count),
        "steps": lambda: kills.kill_at_every_step(subject, root, count),
        "processes": lambda: {
            **processes.stale_locks(subject, root),
            **processes.two_builders(subject, root, count),
            **processes.builder_and_readers(subject, root, count),
        },
        "power": lambda: sum_of(
            [replay.replay(subject, way, root, count) for way in ways]
            + [replay.replay_failed_syncs(subject, way, root, count) for way in ways]
        ),
        "faults": lambda: sum_of(
            [faults.attack_writing(way, root, count) for way in ways]
            + [faults.attack_reading(subject, root, count)]
        ),
        "flips": lambda: sum_of(
            [
                flips.flip_finished(subject, root, count),
                flips.flip_unfinished(subject, root, count),
            ]
        ),
        "fuzz": lambda: fuzz.fuzz(subject, root, count),
        "soak": lambda: soak.soak(dtype, root, count),
    }
    return runs[name]()


def run_all_dtypes(name: str, root: Path, count: int) -> dict[str, dict[str, int]]:
    """Run a part on a cache of each dtype, in this process; counts by dtype."""
    from reliability.subjects import DTYPE_NAMES

    counts = {}
    for dtype in DTYPE_NAMES:
        (root / dtype).mkdir()
        counts[dtype] = run_here(name, root / dtype, dtype, count)
    return counts


def folder_in_memory() -> str | None:
    """Where files need no disk, which is simulated; None where that is not to be had."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def run(name: str, count: int) -> dict[str, Any]:
    """Run a part on a cache of each dtype, in a fresh process; its counts by dtype."""
    # A soak must not take the memory that it counts, and reads from a disk.
    base = None if name == "soak" else folder_in_memory()
    with tempfile.TemporaryDirectory(dir=base, prefix="fpt-fast-reliability-") as root:
        result = subprocess.run(
            [sys.executable, __file__, "--part", name, str(count), root],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)]),
                "OMP_NUM_THREADS": "1",
                # Address space that an arena sets aside is no memory that an input asked for.
                "MALLOC_ARENA_MAX": "1",
            },
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise AssertionError(f"{name}:\n{result.stderr[-6000:]}")
    counts: dict[str, Any] = json.loads(result.stdout)
    return counts


def machine() -> dict[str, str]:
    """Where and from what the figures come, and whether the extension did the reading."""
    from fpt_fast.ops.native_reasons import native_levels, native_missing

    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=10"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "commit": commit.stdout.strip(),
        "cpu": f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "extension": native_missing() or native_levels(),
        "python": platform.python_version(),
        "system": platform.release(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs=3, metavar=("NAME", "COUNT", "ROOT"))
    parser.add_argument("--only", nargs="*", choices=[part.name for part in PARTS])
    parser.add_argument("--results", type=Path, default=RESULTS)
    for part in PARTS:
        parser.add_argument(f"--{part.option}", type=int, default=part.long, help=part.help)
    given = parser.parse_args()
    if given.part:
        name, count, root = given.part
        sys.stdout.write(json.dumps(run_all_dtypes(name, Path(root), int(count))))
        return
    results = json.loads(given.results.read_text()) if given.results.exists() else {}
    for part in PARTS:
        if given.only and part.name not in given.only:
            continue
        started = time.perf_counter()
        counts = run(part.name, getattr(given, part.option))
        sys.stderr.write(f"{part.name}: {counts}\n")
        results[part.name] = {
            "counts": counts,
            "machine": machine(),
            part.option: getattr(given, part.option),
            "seconds": round(time.perf_counter() - started),
            "silent_errors": 0,
        }
        given.results.parent.mkdir(parents=True, exist_ok=True)
        given.results.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
