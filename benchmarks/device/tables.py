"""Markdown of a run: ``python -m benchmarks.device.tables RESULTS.json``."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.device.bars import bars
from benchmarks.device.report import Report

_PASSES = ("images_per_s", "timm_images_per_s", "plain_images_per_s")
_VERDICTS = {True: "met", False: "**not met**", None: "not measured"}


def markdown(report: Report) -> str:
    """Everything that a reader wants, in the order of its worth."""
    return "\n".join(_lines(report))


def _lines(report: Report) -> Iterator[str]:
    content = report.content
    device = dict(report.results("environment")).get("device", {})
    packages = ", ".join(f"{k} {v}" for k, v in device.get("packages", {}).items() if v)
    kind = "Dry run (its times say nothing) on" if content["dry_run"] else "Measured on"
    yield (
        f"{kind} {device.get('device', 'an unknown device')}, {packages or 'versions unknown'}, "
        f"commit `{content['commit']}`, {content['started'][:10]}."
    )
    yield from ("", *_proofs(report))
    yield from ("", "| bar | value | limit | |", "| --- | --- | --- | --- |")
    for bar in bars(report):
        limit = f"{bar['sign']} {_figure(bar['limit'])} {bar['unit']}"
        yield f"| {bar['name']} | {_figure(bar['value'])} | {limit} | {_VERDICTS[bar['met']]} |"
    yield from _ops(report)
    yield from _models(report)
    yield from _steps(report)
    yield from _rivals(report)
    yield from _tuning(report)
    yield from _left_out(report)


def _proofs(report: Report) -> Iterator[str]:
    for name, result in report.results("gpu_tests"):
        yield (
            f"- {name}: {result['passed']} passed, {len(result['failed'])} failed, "
            f"of {result['collected']}"
        )
    races = list(report.results("races"))
    if races:
        differing = sum(row["differing"] for _, row in races)
        repeats = sum(row["repeats"] for _, row in races)
        yield f"- races: {differing} of {repeats} repeats of {len(races)} calls differ"
    yield from (
        f"- {name}: {result['summary']}"
        for name, result in report.results("sanitizer")
        if "summary" in result
    )
    for complaint in report.content.get("failures", []):
        yield f"- FAILED {' '.join(complaint.split())[:300]}"


def _ops(report: Report) -> Iterator[str]:
    rows = [
        (
            name,
            row["impl"],
            _time(row["seconds"]),
            _time(row["eager_seconds"]),
            _time(row.get("plain_seconds")),
            _figure(row.get("plain_over_ours")),
            _figure(row["gb_per_s"]),
            _figure(row["tflop_per_s"]),
            _share(row["share_of_floor"]),
            _megabytes(row["peak_added"]),
        )
        for name, row in report.results("ops")
    ]
    head = "op | impl | time | with launches | plain | plain / ours | GB/s | TFLOP/s"
    yield from _table("Ops", f"{head} | share of floor | memory added", rows)


def _models(report: Report) -> Iterator[str]:
    rows = [
        (
            name,
            _time(row["seconds"]),
            _figure(next((row[key] for key in _PASSES if key in row), None)),
            _time(row.get("plain_seconds")),
            _figure(row.get("plain_over_ours")),
            _megabytes(row.get("peak_added")),
            _megabytes(row.get("plain_peak_added")),
        )
        for name, row in report.results("models")
    ]
    head = "model | time | images/s | plain | plain / ours | memory | plain's memory"
    yield from _table("Models", head, rows)


def _steps(report: Report) -> Iterator[str]:
    rows = [
        (
            name,
            _time(row["seconds"]),
            _figure(row["launches"]),
            _megabytes(row["peak"]),
            _share(row["share_of_floor"]),
        )
        for name, row in report.results("steps")
    ]
    yield from _table("Steps", "step | time | launches | peak memory | share of floor", rows)


def _rivals(report: Report) -> Iterator[str]:
    rows = [
        (name, rival, _time(row["ours"]), _time(found["seconds"]), _figure(found.get("over_ours")))
        for name, row in report.results("rivals")
        for rival, found in row["rivals"].items()
    ]
    yield from _table("Rivals", "op | rival | ours | rival's | rival / ours", rows)


def _tuning(report: Report) -> Iterator[str]:
    rows = [
        (
            f"{row['kernel']} {row['dtype']} D{row['padded']} {row['architecture']}",
            name,
            f"Tile({', '.join(map(str, row['present'][:4]))})",
            _time(row["present"][4]),
            row["row"],
            _time(row["best"][4]),
            f"{row['gain']:.2f}",
            f"{len(row['tried'])} tried, {len(row['failed'])} failed, {row['not_tried']} not tried",
        )
        for name, row in report.results("tuning")
        if row["kernel"] is not None
    ]
    head = "launch-table row | measured by | present | time | best | time | gain | candidates"
    yield from _table("Tuning", head, rows)


def _left_out(report: Report) -> Iterator[str]:
    names = [
        f"- {phase}: {name}: {item['state']}: {item['why'].splitlines()[0][:200]}"
        for phase, content in report.content["phases"].items()
        for name, item in content["items"].items()
        if item["state"] != "done"
    ]
    names += [
        f"- {phase}: not reached"
        for phase in report.content["wanted"]
        if phase not in report.content["phases"]
    ]
    if names:
        yield from ("", "Left out:", *names)


def _table(title: str, head: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    rows = list(rows)
    if rows:
        rule = " | ".join(["---"] * (head.count("|") + 1))
        yield from ("", f"{title}:", "", f"| {head} |", f"| {rule} |")
        yield from (f"| {' | '.join(row)} |" for row in rows)


def _figure(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _megabytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 1e6:,.1f} MB"


if __name__ == "__main__":
    sys.stdout.write(markdown(Report.load(Path(sys.argv[1]))) + "\n")
