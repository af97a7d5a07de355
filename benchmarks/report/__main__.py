"""Turn the JSON of ``make bench`` into Markdown, plots and the figures of README.md.

``python -m benchmarks.report`` reads every file of benchmarks/results, or those named, and writes
docs/benchmarks.md, docs/figures/benchmarks.svg and the marked block of README.md, and says what a
file lacks.
``--compare BASE HEAD`` prints one against the other instead, without the speed of what failed.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.report import compare, readme, tables
from benchmarks.report.results import complaints, is_results, read_results

ROOT = Path(__file__).resolve().parents[2]


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where the comparison holds something red."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="JSON of `make bench`, one a machine")
    parser.add_argument("--demo", type=Path, help="demo.json of a run of the demo")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BASE", "HEAD"))
    parser.add_argument(
        "--junit", nargs="*", type=Path, default=[], help="JUnit XML of the tests, with --compare"
    )
    given = parser.parse_args(arguments)
    if given.compare:
        base, head = (read_results(path) for path in given.compare)
        lines, is_green = compare.compare(base, head, compare.red_files(given.junit))
        print("\n".join(lines))
        return 0 if is_green else 1
    folder = ROOT / "benchmarks" / "results"
    files = given.files or [path for path in sorted(folder.glob("*.json")) if is_results(path)]
    if not files:
        parser.error(f"no JSON of `make bench` in {folder}; run it first, or name a file")
    results = [read_results(path) for path in files]
    demo_file = given.demo or folder / "demo.json"
    demo = json.loads(demo_file.read_text()) if demo_file.exists() or given.demo else None
    figures = given.docs / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    (figures / "benchmarks.svg").write_bytes(tables.ratio_bars(results))
    (given.docs / "benchmarks.md").write_text(tables.markdown(results), encoding="utf-8")
    readme.rewrite(given.readme, results, demo)
    print(f"wrote {given.docs / 'benchmarks.md'} and the figures of {given.readme}")
    benches = sorted((ROOT / "benchmarks").glob("bench_*.py"))
    for path in files:
        for complaint in complaints(json.loads(path.read_text(encoding="utf-8")), benches):
            print(f"{path.name}: {complaint}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
