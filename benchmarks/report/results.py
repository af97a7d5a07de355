"""JSON files of ``make bench`` as machines and rows."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.beside import lacking


@dataclass(frozen=True)
class Row:
    """One benchmark of one run; ``seconds`` is the median, ``info`` what it said of itself."""

    fullname: str
    name: str
    group: str
    params: Mapping[str, Any]
    seconds: float
    info: Mapping[str, Any]

    @property
    def file(self) -> str:
        """``benchmarks/bench_cache.py``."""
        return self.fullname.partition("::")[0]

    @property
    def label(self) -> str:
        """The name without what every name begins with."""
        return self.name.removeprefix("bench_")

    @property
    def ratio(self) -> float | None:
        """Plain over ours."""
        value = self.info.get("plain_over_ours", self.info.get("ratio"))
        return None if value is None else float(value)


@dataclass(frozen=True)
class Results:
    """One JSON file: a machine, a commit, its rows, and the benchmarks that failed."""

    path: Path
    machine: str
    python: str
    packages: Mapping[str, str | None]
    commit: str
    date: str
    sizes: str
    rows: tuple[Row, ...]
    failed: tuple[str, ...]

    @property
    def head(self) -> str:
        """The machine and what was measured, in a sentence."""
        versions = ", ".join(f"{name} {v}" for name, v in self.packages.items() if v)
        return (
            f"{self.machine}, Python {self.python}{', ' + versions if versions else ''}, "
            f"commit `{self.commit[:10]}` ({self.date[:10]}), {self.sizes} sizes"
        )


def read_results(path: Path) -> Results:
    """Read a file; ``ValueError`` where it is not pytest-benchmark's."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or "benchmarks" not in content:
        raise ValueError(
            f"{path} must be JSON of `make bench` (pytest-benchmark), which has 'benchmarks'; "
            f"got {sorted(content)[:5] if isinstance(content, dict) else type(content).__name__}"
        )
    machine = content["machine_info"]
    cpu = machine.get("cpu", {})
    gpu = machine.get("gpu")
    return Results(
        path=path,
        machine=f"{cpu.get('brand_raw', 'an unknown CPU')}, {cpu.get('count', '?')} cores, "
        f"{gpu or 'no GPU'}",
        python=machine["python_version"],
        packages=machine.get("packages", {}),
        commit=content["commit_info"]["id"],
        date=content["datetime"],
        # Files of before this was written down were all of `make figures`.
        sizes=content.get("sizes", "full"),
        rows=tuple(_row(bench) for bench in content["benchmarks"]),
        failed=tuple(content.get("failed", ())),
    )


def complaints(content: Mapping[str, Any], benches: Iterable[Path] = ()) -> list[str]:
    """What JSON of ``make bench`` lacks: of the machine, of a row (``MEASURED``, in beside.py), or
    rows of one of the files ``benches``."""
    machine = content["machine_info"]
    needed = ("python_version", "cpu", "packages", "threads", "extension", "ceilings")
    found = [f"machine_info lacks {name}" for name in needed if not machine.get(name)]
    for bench in content["benchmarks"]:
        if missing := lacking(bench["extra_info"]):
            found.append(f"{bench['fullname']} lacks {', '.join(missing)}")
    rows = {Path(bench["fullname"].partition("::")[0]).name for bench in content["benchmarks"]}
    absent = sorted(path.name for path in benches if path.name not in rows)
    return [*found, *(f"no row of {name}" for name in absent)]


def is_results(path: Path) -> bool:
    """Whether a JSON file is pytest-benchmark's: other results lie beside them."""
    try:
        read_results(path)
    except (ValueError, KeyError):
        return False
    return True


def _row(bench: Mapping[str, Any]) -> Row:
    return Row(
        fullname=bench["fullname"],
        name=bench["name"],
        group=bench["group"] or bench["fullname"].rpartition("bench_")[2].partition("[")[0],
        params=bench["params"] or {},
        # What ran in a process of its own says how long that took.
        seconds=bench["extra_info"].get("seconds", bench["stats"]["median"]),
        info=bench["extra_info"],
    )


def seconds(value: float | None) -> str:
    """Three digits and a unit; a dash for what was not measured."""
    if value is None:
        return "–"
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def figure(value: float | None) -> str:
    """Three digits; a dash for what was not measured."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def megabytes(value: float | None) -> str:
    """Bytes as MB; a dash for what was not measured."""
    return "–" if value is None else f"{value / 1e6:,.3g} MB"
