"""Put a table that was made into the repository: ``python -m benchmarks.tables.publish FOLDER``.

``NAME.md`` goes between its marks in docs/evidence.md, the plot to docs/figures, JSON and CSV to
benchmarks/results/tables; all as ``NAME-AS``.
"""

import argparse
import shutil
import sys
from pathlib import Path

from benchmarks.marked_block import write_block
from benchmarks.tables.variants import TABLES

ROOT = Path(__file__).resolve().parents[2]


def publish(folder: Path, name: str, root: Path = ROOT) -> list[str]:
    """Publish every table in ``folder`` as ``TABLE-name``; returns what was published."""
    done = []
    for table in TABLES:
        if not (folder / f"{table}.md").exists():
            continue
        label = f"{table}-{name}"
        (root / "docs" / "figures").mkdir(parents=True, exist_ok=True)
        results = root / "benchmarks" / "results" / "tables"
        results.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / f"{table}.svg", root / "docs" / "figures" / f"{label}.svg")
        for ending in ("json", "csv"):
            shutil.copyfile(folder / f"{table}.{ending}", results / f"{label}.{ending}")
        # The document has its own heading.
        text = (folder / f"{table}.md").read_text(encoding="utf-8").partition("\n")[2].strip()
        plot = f"![AUC against memory](figures/{label}.svg)"
        marks = f"<!-- {label}: begin -->", f"<!-- {label}: end -->"
        write_block(root / "docs" / "evidence.md", *marks, f"{text}\n\n{plot}")
        done.append(label)
    return done


def main() -> int:
    """0, or 1 where the folder holds no table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables.publish", description=__doc__
    )
    parser.add_argument("folder", type=Path, help="--output of benchmarks.tables")
    parser.add_argument("--name", required=True, help="of the data, as digits")
    given = parser.parse_args()
    done = publish(given.folder, given.name)
    print("\n".join(done) or f"{given.folder} holds no table")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
