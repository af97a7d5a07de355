"""Write the reliability block of README.md from what ``make reliability`` counted.

    python -m benchmarks.readme_reliability

Reads benchmarks/results/reliability.json.  Counts are sums over the dtypes of a cache.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.marked_block import write_block

START = "<!-- reliability: written by benchmarks/readme_reliability.py -->"
END = "<!-- end of reliability -->"
RESULTS = Path(__file__).resolve().parent / "results" / "reliability.json"
# (part, count, what was counted)
ROWS = (
    ("kills", "kills", "`kill -9` at random instants, then verified and resumed"),
    ("steps", "kills", "`kill -9` at steps of the write protocol, torn writes included"),
    ("processes", "refusals", "second builders refused while a cache was being built"),
    ("processes", "looks", "looks of readers at a cache under construction"),
    ("power", "replays", "disks that a power loss may leave: orders of writes, torn pages"),
    ("faults", "faults", "calls that failed: no space, I/O error, interrupted, short"),
    ("flips", "flips", "bytes changed in finished and half-built caches"),
    ("fuzz", "inputs", "lying manifests, plans, shards and journals, checksums right"),
    ("soak", "epochs", "epochs under a memory limit smaller than the cache"),
)


def total(part: Mapping[str, Any], name: str) -> int:
    """A count, over all dtypes."""
    return sum(counts[name] for counts in part["counts"].values())


def render(results: Mapping[str, Any]) -> str:
    """The block between the markers, as Markdown."""
    machines = [part["machine"] for part in results.values()]
    places = sorted({(m["date"], m["cpu"], m["commit"]) for m in machines})
    where = " and ".join(f"{cpu}, at `{commit}` ({date})" for date, cpu, commit in places)
    silent = sum(part["silent_errors"] for part in results.values())
    lines = [
        f"The cache was attacked by `make reliability` on {where}, in f16, int8 and fp8. Each "
        "time it held what had been written, or refused to open and said why. "
        f"Silent errors: {silent}.",
        "",
        "| attack | count |",
        "| --- | --- |",
        *(
            f"| {what} | {total(results[part], name):,} |"
            for part, name, what in ROWS
            if part in results
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    given = parser.parse_args()
    block = render(json.loads(given.results.read_text(encoding="utf-8")))
    write_block(given.readme, START, END, block)


if __name__ == "__main__":
    main()
