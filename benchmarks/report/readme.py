"""The figures block of README.md, between its two marks; nothing else of the page is touched."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.report.results import Results, Row

START = "<!-- figures: written by python -m benchmarks.report -->"
END = "<!-- end of figures -->"

_Cells = tuple[str, str, str, str]


def rewrite(readme: Path, results: list[Results], demo: Mapping[str, Any] | None) -> None:
    """Replace the block; ``ValueError`` where the page has not both marks."""
    text = readme.read_text(encoding="utf-8")
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{readme} must hold the lines {START} and {END}")
    readme.write_text(f"{head}{START}\n{render(results, demo)}\n{END}{tail}", encoding="utf-8")


def render(results: list[Results], demo: Mapping[str, Any] | None) -> str:
    """A table for each machine, of the rows that were measured there at the published sizes."""
    lines: list[str] = []
    for one in results:
        rows = [cells for row in one.rows for cells in _cells(row)]
        if one.sizes != "full" or not rows:
            continue
        lines += [
            f"Measured on {one.machine}, Python {one.python}, by `make bench` at commit "
            f"`{one.commit[:10]}` ({one.date[:10]}). ViT-B/16, 512 px, N = 1025; *plain* is the "
            "published algorithm in plain f32 PyTorch (`benchmarks/plain/`), alternating with ours "
            "in one run. Medians.",
            "",
            "| what | ours | plain | plain / ours |",
            "| --- | --- | --- | --- |",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
        ]
    if demo is not None:
        lines += _demo(demo)
    return "\n".join(lines).rstrip()


def _cells(row: Row) -> Iterator[_Cells]:
    info, name = row.info, row.name
    if name == "bench_frozen_pass":
        dtype = info["dtype"].removeprefix("torch.")
        yield _beside(f"preloading one image, {dtype}", row)
        what = "timm's forward alone (no scores, no selection), same dtype"
        yield what, _seconds(info["timm_seconds"]), "", ""
    elif name.startswith("bench_frozen_pass_memory"):
        size = row.params["size"]
        what = f"memory added by one pass at {size} px (N = {info['tokens']})"
        plain = info.get("plain_peak_added")
        ratio = "" if plain is None else f"{plain / info['added']:.1f}"
        yield what, _megabytes(info["added"]), "" if plain is None else _megabytes(plain), ratio
    elif name.startswith("bench_training_step") and row.ratio is not None:
        method = info["method"].replace("fpt_plus", "FPT+").replace("fpt", "FPT")
        yield _beside(f"training step, {method}, batch 16{_how(info)}", row)
    elif name.startswith("bench_epoch") and row.ratio is not None:
        yield from _epoch(row)
    elif name.startswith("bench_sweep") and row.ratio is not None:
        what = f"a step of {info['models']} models of a sweep, FPT+{_how(info)}"
        times = f"{info['times_one']:.1f} steps of one model, same arithmetic"
        yield f"{what} ({times})", *_beside("", row)[1:]


def _epoch(row: Row) -> Iterator[_Cells]:
    info = row.info
    what = {
        "epoch": "an epoch of 600 JPEGs of 1024 px, FPT+, batch 16, everything included",
        "steps": "its steps alone, reading of features included",
    }[info["part"]]
    yield _beside(what + _how(info), row)
    if "shrink_seconds" in info:
        what = "shrinking its side images, once a run (with it, over 20 epochs)"
        yield what, _seconds(info["shrink_seconds"]), "", f"{info['ratio_over_20_epochs']:.1f}"


def _how(info: Mapping[str, Any]) -> str:
    return ", products in bf16" if info.get("precision") == "bfloat16" else ""


def _beside(what: str, row: Row) -> _Cells:
    return what, _seconds(row.seconds), _seconds(row.info["plain_seconds"]), f"{row.ratio:.1f}"


def _demo(demo: Mapping[str, Any]) -> list[str]:
    return [
        f"The demo (`make demo`: {demo['images']} images of 512 px, {demo['classes']} classes of "
        f"digits, {demo['epochs']} epochs) took {demo['seconds']:.0f} s there. Test AUC:",
        "",
        "| FPT+ | side network alone | linear probe of the frozen model at 512 px |",
        "| --- | --- | --- |",
        f"| {demo['fpt_plus_auc']:.3f} | {demo['side_alone_auc']:.3f} "
        f"| {demo['linear_probe_auc']:.3f} |",
    ]


def _seconds(value: float) -> str:
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.2f} s"


def _megabytes(value: float) -> str:
    return f"{value / 1e6:.0f} MB"
