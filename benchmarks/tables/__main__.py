"""Make a table of the papers on the data at hand: ``methods``, ``components`` or ``ratios``.

``python -m benchmarks.tables ratios --task digits --images 300 --input-size 128 --seeds 3``
writes ratios.md, .csv, .json and .svg into --output, where its caches and runs are too: what is
there already is not made again, so a stopped table goes on where it was.
"""

import argparse
import dataclasses
import json
import logging
import platform
import sys
from pathlib import Path

import torch

from benchmarks.tables import published
from benchmarks.tables.memory import memory_of
from benchmarks.tables.runs import Run, run_all
from benchmarks.tables.summary import Row, row_of, write
from benchmarks.tables.variants import TABLES, TITLES, Options
from fpt_fast.demo.run import BACKBONE
from fpt_fast.demo.tasks import TASKS, make_task
from fpt_fast.images import dataset_preset, preset_names

SEARCH = (
    "learning rates of which each row takes the one with the best validation AUC of its first seed"
)


def main(arguments: list[str] | None = None) -> int:
    """Make one table; returns 0."""
    parser = _parser()
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options, about = settle(given)
    variants = list(TABLES[given.table](options))
    if given.rows:
        names = [variant.name for variant in variants]
        if unknown := set(given.rows).difference(names):
            parser.error(
                f"--rows: {given.table} has no row {', '.join(sorted(unknown))}; its rows are "
                f"{', '.join(names)}"
            )
        variants = [variant for variant in variants if variant.name in given.rows]
    runs: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    for run in run_all(variants, options):
        runs[run.variant.name].append(run)
    rows: list[Row] = []
    for variant in variants:
        mine = runs[variant.name]
        row = row_of(mine, memory_of(variant, options, mine[0].folder))
        if given.published and given.table == "methods":
            auc = published.published_auc(given.published, variant.name)
            row = dataclasses.replace(row, published_auc=auc)
        rows.append(row)
    about = [*about, f"Made by {command(arguments)}"]
    title = f"{TITLES[given.table]}, {given.task or given.published or options.data.name}"
    paths = write(options.output, given.table, title, rows, [" ".join(about)])
    print(paths[0].read_text(encoding="utf-8"))
    print("\n".join(map(str, paths)))
    return 0


def settle(given: argparse.Namespace) -> tuple[Options, list[str]]:
    """Where the data are and how they are trained on, and that in words."""
    normalization, learning_rate, size = given.normalization, given.learning_rate, given.input_size
    if given.task:
        size = size or 512
        data = given.output / "data" / f"{given.task}-{given.images}-{size}"
        make_task(given.task, data, images=given.images, size=size)
        about = f"Task `{given.task}` of {given.images} real images at {size} px, no clinical data."
    elif given.published:
        if given.data is None:
            raise SystemExit("--published needs --data, the folder of the download")
        preset = dataset_preset(given.published)
        data = published.write_list(given.published, given.data)
        normalization, size = normalization or preset.name, size or preset.input_size
        learning_rate = learning_rate or preset.learning_rate
        about = f"Data set {given.published} with the published settings."
    elif given.data:
        data, about = given.data, f"Data: {given.data.name}."
    else:
        raise SystemExit("say what to train on: --task, --data, or --published with --data")
    options = Options(
        data=data,
        output=given.output,
        backbone=given.backbone,
        input_size=size or 512,
        side_size=given.side_size,
        method=given.method,
        epochs=given.epochs,
        batch_size=given.batch_size,
        learning_rate=learning_rate,
        search=tuple(given.search),
        rates=json.loads(given.rates.read_text(encoding="utf-8")) if given.rates else {},
        normalization=normalization or "auto",
        seeds=given.seeds,
        workers=given.workers,
    )
    is_demo = Path(given.backbone).resolve() == BACKBONE.resolve()
    model = (
        "the bundled demo backbone (a small ViT, no published one)"
        if is_demo
        else (f"`{Path(given.backbone).name}`")
    )
    where = f"{platform.machine()}, torch {torch.__version__}"
    values = dataclasses.asdict(options)
    kept = ("input_size", "side_size", "epochs", "batch_size", "learning_rate", "seeds")
    said = ", ".join(
        f"{name.replace('_', ' ')} {values[name]}" for name in kept if values[name] is not None
    )
    return options, [about, f"Frozen model: {model}; {said}; {where}."]


def command(arguments: list[str] | None) -> str:
    """The command line, without the folders of one machine."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    hidden = {"--output", "--data", "--backbone"}
    shown = [
        Path(word).name if index and words[index - 1] in hidden else word
        for index, word in enumerate(words)
    ]
    return f"`python -m benchmarks.tables {' '.join(shown)}`."


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--task", choices=TASKS, help="real images that need no download")
    add("--images", type=int, default=300, help="of the task, over all splits")
    add("--data", type=Path, help="folder or CSV list as `train` takes it")
    add("--published", choices=preset_names(), help="a public data set; --data is its download")
    add("--backbone", default=str(BACKBONE), help="timm name or directory (default: the demo's)")
    add("--output", type=Path, default=Path("table-output"))
    add("--seeds", type=int, default=3)
    add("--epochs", type=int, default=20)
    add("--batch-size", type=int, default=16)
    add("--learning-rate", type=float, help="(default: of --published, else of `train`)")
    add("--search", nargs="*", type=float, default=(), help=SEARCH)
    add("--rates", type=Path, help="rates.json of a table with --search, for these rows")
    add("--input-size", type=int, help="of the frozen model in pixels (default 512)")
    add("--side-size", type=int, help="of the side network (default: the method's own)")
    add("--normalization", help="as `preload` takes it (default auto, or that of --published)")
    add("--method", choices=("fpt_plus", "fpt"), default="fpt_plus", help="of the other tables")
    add("--rows", nargs="*", help="only these rows, by name")
    add("--workers", type=int, default=2)
    return parser


if __name__ == "__main__":
    sys.exit(main())
