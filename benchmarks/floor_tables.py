"""The tables of docs/cpu-floors.md from the JSON of ``benchmarks/floor_shares.py``."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "cpu-floors.md"
START = "<!-- tables: written by benchmarks/floor_shares.py -->"
END = "<!-- end of tables -->"
TIMES = ("ms", "floor, ms", "share")
RATIOS = ("plain / ours", "plain / floor")
METHODS = {"fpt_plus": "FPT+", "fpt": "FPT"}


def render(result: Mapping[str, Any]) -> str:
    """Markdown of all tables."""
    machine = result["machine"]
    first = (
        f"{machine['processor']}, {machine['threads']} "
        f"thread{'s' if machine['threads'] > 1 else ', its own time'}, load average "
        f"{machine['load']:.1f}, torch {machine['torch']}: copies "
        f"at {machine['copy_GBs']:.1f} GB/s (read and written), matrix products at "
        f"{machine['f32_GFLOPs']:.0f} GFLOP/s in f32 and {machine['bf16_GFLOPs']:.0f} in bf16."
    )
    return "\n\n".join(
        [
            first,
            table(
                ("op", "case", "dtypes", *TIMES, "torch / ours"),
                op_cells(result["ops"]),
            ),
            table(
                ("reading", "checked", "threads", "ms a batch", "of memcpy"),
                read_cells(result["reading"]),
            ),
            table(
                ("step", *TIMES, "plain, ms", "its reading, ms", *RATIOS),
                step_cells(result["steps"]),
            ),
            table(
                ("step", *result["steps"][0]["parts"]),
                ([name_of(row), *map(percent, row["parts"].values())] for row in result["steps"]),
            ),
            table(
                ("frozen pass", *TIMES, "timm alone, ms", *RATIOS),
                [frozen_cells(result["frozen_pass"])],
            ),
        ]
    )


def op_cells(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    """One line an op, way and dtype."""
    for row in rows:
        times = [ms(row["seconds"]), ms(row["floor_seconds"]), percent(row["share"])]
        yield [row["what"], row["case"], row["dtype"], *times, f"{row['plain_over_ours']:.1f}"]


def read_cells(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    """One line a mode."""
    for row in rows:
        checked = "yes" if row["verified"] else "no"
        share = percent(row["of_memcpy"])
        yield [row["mode"], checked, str(row["threads"]), ms(row["seconds"]), share]


def step_cells(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[str]]:
    """One line a method."""
    for row in rows:
        yield [
            name_of(row),
            *(ms(row["seconds"]), ms(row["floor_seconds"]), percent(row["share"])),
            *(ms(row["plain_seconds"]), ms(row["plain_reading_seconds"])),
            *(f"{row['ratio']:.1f}", f"{row['ratio_at_floor']:.1f}"),
        ]


def frozen_cells(row: Mapping[str, Any]) -> list[str]:
    """The line of the frozen pass."""
    return [
        row["dtype"],
        *(ms(row["seconds"]), ms(row["floor_seconds"]), percent(row["share"])),
        ms(row["timm_seconds"]),
        *(f"{row['plain_over_ours']:.1f}", f"{row['plain_over_floor']:.1f}"),
    ]


def name_of(row: Mapping[str, Any]) -> str:
    """As people write the method."""
    return METHODS[row["method"]] + (", products in bf16" if row["precision"] == "bfloat16" else "")


def table(head: Iterable[str], body: Iterable[list[str]]) -> str:
    """Markdown."""
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def ms(seconds: float) -> str:
    """Three digits."""
    return f"{seconds * 1e3:.3g}"


def percent(share: float) -> str:
    """Whole percents."""
    return f"{share:.0%}"
