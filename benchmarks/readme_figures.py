"""Write the figures block of README.md from measured results; ``make figures`` makes them anew.

Reads the JSON of ``pytest benchmarks --benchmark-only --full`` and the demo's ``demo.json``.
No figure is typed by hand: what was not measured is left out.
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

START = "<!-- figures: written by benchmarks/readme_figures.py -->"
END = "<!-- end of figures -->"


def render(results: Mapping[str, Any], demo: Mapping[str, Any] | None) -> str:
    """The block between the markers, as Markdown."""
    machine = results["machine_info"]
    cpu = machine.get("cpu", {})
    rows = [row for bench in results["benchmarks"] for row in _rows(bench)]
    lines = [
        f"Measured on {cpu.get('brand_raw', 'an unknown CPU')}, {cpu.get('count', '?')} cores, "
        f"no GPU, Python {machine['python_version']}, by `make figures` at commit "
        f"`{results['commit_info']['id'][:10]}` ({results['datetime'][:10]}). ViT-B/16, 512 px, "
        "N = 1025; *plain* is the published algorithm in plain f32 PyTorch (`benchmarks/plain/`), "
        "alternating with ours in one run. Medians.",
        "",
        "| what | ours | plain | plain / ours |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]
    if demo is not None:
        lines += ["", *_demo(demo)]
    return "\n".join(lines)


def _rows(bench: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    info, name = bench["extra_info"], bench["name"]
    seconds = bench["stats"]["median"]
    if name == "bench_frozen_pass":
        yield (
            f"preloading one image, {info['dtype'].removeprefix('torch.')}",
            _seconds(seconds),
            _seconds(info["plain_seconds"]),
            f"{info['plain_over_ours']:.1f}",
        )
        yield (
            "timm's forward alone (no scores, no selection), same dtype",
            _seconds(info["timm_seconds"]),
            "",
            "",
        )
    elif name.startswith("bench_frozen_pass_memory"):
        what = f"memory added by one pass at {bench['params']['size']} px (N = {info['tokens']})"
        yield what, _megabytes(info["added"]), "", ""
    elif name.startswith("bench_training_step") and "ratio" in info:
        yield (
            f"training step, {info['method'].replace('fpt_plus', 'FPT+').replace('fpt', 'FPT')}, "
            "batch 16",
            _seconds(seconds),
            _seconds(info["plain_seconds"]),
            f"{info['ratio']:.1f}",
        )
    elif name.startswith("bench_epoch") and "ratio" in info:
        yield from _epoch_rows(seconds, info)


def _epoch_rows(seconds: float, info: Mapping[str, Any]) -> Iterable[tuple[str, str, str, str]]:
    what = {
        "epoch": "an epoch of 600 JPEGs of 1024 px, FPT+, batch 16, everything included",
        "steps": "its steps alone, reading of features included",
    }[info["part"]]
    yield what, _seconds(seconds), _seconds(info["plain_seconds"]), f"{info['ratio']:.1f}"
    if "shrink_seconds" in info:
        yield (
            "shrinking its side images, once a run (with it, over 20 epochs)",
            _seconds(info["shrink_seconds"]),
            "",
            f"{info['ratio_over_20_epochs']:.1f}",
        )


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, required=True, help="pytest-benchmark's JSON")
    parser.add_argument("--demo", type=Path, help="demo.json of a run of the demo")
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    given = parser.parse_args()
    demo = json.loads(given.demo.read_text()) if given.demo else None
    block = render(json.loads(given.results.read_text()), demo)
    text = given.readme.read_text(encoding="utf-8")
    head, start, rest = text.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{given.readme} must hold the lines {START} and {END}")
    given.readme.write_text(f"{head}{START}\n{block}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
