"""Put a table that was made into the repository: ``python -m benchmarks.tables.publish FOLDER``.

``TABLE.md`` goes between its marks in docs/evidence.md, JSON and CSV to benchmarks/results/tables,
and the plot of the JSON to docs/figures; all as ``TABLE-NAME``.  Without a folder the plots of all
that was published are drawn anew.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from benchmarks.marked_block import write_block
from benchmarks.tables.summary import plot
from benchmarks.tables.variants import TABLES, TITLES

ROOT = Path(__file__).resolve().parents[2]


def publish(folder: Path, name: str, root: Path = ROOT) -> list[str]:
    """Publish every table in ``folder`` as ``TABLE-name``; returns what was published."""
    done = []
    for table in TABLES:
        if not (folder / f"{table}.md").exists():
            continue
        label = f"{table}-{name}"
        results = root / "benchmarks" / "results" / "tables"
        results.mkdir(parents=True, exist_ok=True)
        for ending in ("json", "csv"):
            shutil.copyfile(folder / f"{table}.{ending}", results / f"{label}.{ending}")
        draw(results / f"{label}.json", root)
        # The document has its own heading.
        text = (folder / f"{table}.md").read_text(encoding="utf-8").partition("\n")[2].strip()
        picture = f"![AUC against memory](figures/{label}.svg)"
        marks = f"<!-- {label}: begin -->", f"<!-- {label}: end -->"
        write_block(root / "docs" / "evidence.md", *marks, f"{text}\n\n{picture}")
        done.append(label)
    return done


def draw(path: Path, root: Path = ROOT) -> None:
    """The plot of published JSON, ``TABLE-NAME.json``, in docs/figures."""
    table, _, name = path.stem.partition("-")
    rows = json.loads(path.read_text(encoding="utf-8"))
    folder = root / "docs" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{path.stem}.svg").write_bytes(plot(f"{TITLES[table]}, {name}", rows))


def main() -> int:
    """0, or 1 where the folder holds no table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables.publish", description=__doc__
    )
    parser.add_argument("folder", type=Path, nargs="?", help="--output of benchmarks.tables")
    parser.add_argument("--name", help="of the data, as digits")
    given = parser.parse_args()
    if given.folder is None:
        for path in sorted((ROOT / "benchmarks" / "results" / "tables").glob("*.json")):
            draw(path)
        return 0
    if given.name is None:
        parser.error("a folder needs --name, of the data, as digits")
    done = publish(given.folder, given.name)
    print("\n".join(done) or f"{given.folder} holds no table")
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
