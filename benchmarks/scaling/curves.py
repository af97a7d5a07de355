"""What is measured along each curve: a point is a size, who, seconds, bytes, or why there is none.

``small`` sizes run anywhere in minutes with a tiny model; the others are those of ViT-B at 512 px.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil
import torch

from benchmarks.bench_epoch import BATCH, make_loader, our_epoch, prepare
from benchmarks.bench_sweep import sweep_steps
from benchmarks.bench_training_step import optimizer_of, plain_model, steps_of
from benchmarks.beside import clock, peak_added
from benchmarks.frozen_pass_memory import added_bytes
from benchmarks.plain.epoch import PlainDataset, plain_epoch
from fpt_fast.images import shrink_images

_SMALL_VIT = {"width": 192, "heads": 3, "depth": 4}
_VIT_B = {"width": 768, "heads": 12, "depth": 12}
_TOKENS = 1025
# Of the memory that is free, what the plain pass may be expected to need.
_SHARE = 0.6


@dataclass(frozen=True)
class Point:
    """``x`` is the size along the curve; ``died`` says why there are no figures."""

    curve: str
    x: float
    who: str
    seconds: float | None = None
    bytes: int | None = None
    died: str | None = None


@dataclass(frozen=True)
class Curve:
    """Its axis, the meaning of its bytes, its sizes (published, small), and one size's points."""

    name: str
    title: str
    axis: str
    memory: str
    sizes: tuple[tuple[float, ...], tuple[float, ...]]
    measure: Callable[[float, bool], Iterator[Point]]


def resolution(size: float, small: bool) -> Iterator[Point]:
    """A frozen pass of one image in a process of its own, ours in the dtype that ``auto`` takes on
    the machine (bf16 where it multiplies that faster); the plain one until its maps outgrow the
    machine."""
    shape = _SMALL_VIT if small else _VIT_B
    words = ["--size", str(int(size))]
    for name, value in shape.items():
        words += [f"--{name}", str(value)]
    ours = added_bytes(*words)
    yield Point("resolution", size, "ours", ours["seconds"], ours["added"])
    # The plain pass holds a layer's scores and their softmax at the same time.
    needed = 2 * 4 * shape["heads"] * ours["tokens"] ** 2
    free = psutil.virtual_memory().available
    if needed > _SHARE * free:
        why = f"two maps of one layer are {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        yield Point("resolution", size, "plain", died=why)
    else:
        plain = added_bytes(*words, "--plain")
        yield Point("resolution", size, "plain", plain["seconds"], plain["added"])


def ratio(share: float, small: bool) -> Iterator[Point]:
    """A training step of FPT+ in f32, batch 16, with this share of the tokens."""
    kept = max(1, int(share * (65 if small else _TOKENS)))
    ours, plain, _ = steps_of("fpt_plus", not small, kept=kept)
    yield from pair("ratio", share, ours, plain)


def batch(count: float, small: bool) -> Iterator[Point]:
    """A training step of FPT+ in f32 with so many images."""
    ours, plain, _ = steps_of("fpt_plus", not small, count=int(count))
    yield from pair("batch", count, ours, plain)


def images(count: float, small: bool) -> Iterator[Point]:
    """An epoch of so many JPEGs, everything included but the shrinking of the side images; bytes
    are those of the features on disk."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setting = prepare(folder, not small, int(count))
        loader = make_loader(
            setting, shrink_images(setting.items, setting.side, augmented=True), "epoch"
        )
        plain = plain_model(setting.model).train()
        optimizer = optimizer_of(plain)
        dataset = PlainDataset(
            [item.path for item in setting.items],
            setting.plain_features,
            [item.label for item in setting.items],
            setting.side.size,
        )
        runs = {
            "ours": lambda: our_epoch(setting, loader, folder / "runs"),
            "plain": lambda: plain_epoch(plain, dataset, optimizer, BATCH),
        }
        taken = alternating(runs, rounds=2)
        setting.reader.close()
        disk = {
            "ours": sum(p.stat().st_size for p in (folder / "cache").rglob("*") if p.is_file()),
            "plain": sum(path.stat().st_size for path in setting.plain_features),
        }
    for who, seconds in taken.items():
        yield Point("images", count, who, seconds, disk[who])


def models(count: float, small: bool) -> Iterator[Point]:
    """A step of so many models in f32: ours side by side, the plain ones one after another."""
    torch.manual_seed(0)
    steps = sweep_steps(int(count), not small)
    yield from pair("models", count, steps.together, steps.plain)


CURVES = {
    curve.name: curve
    for curve in (
        Curve(
            "resolution",
            "Frozen pass of one image",
            "input, px",
            "memory added, MB",
            ((256, 384, 512, 768, 1024, 1536, 2048), (128, 256, 512, 1024)),
            resolution,
        ),
        Curve(
            "ratio",
            "Training step by token ratio",
            "share of tokens kept",
            "allocated in a step, MB",
            ((0.05, 0.1, 0.2, 0.4, 0.7, 1.0), (0.1, 0.2, 0.5, 1.0)),
            ratio,
        ),
        Curve(
            "batch",
            "Training step by batch size",
            "images in a batch",
            "allocated in a step, MB",
            ((1, 4, 16, 32, 64), (1, 4, 16, 64)),
            batch,
        ),
        Curve(
            "images",
            "An epoch by number of images",
            "images",
            "features on disk, MB",
            ((50, 100, 200, 400), (32, 128, 512)),
            images,
        ),
        Curve(
            "models",
            "A step by models in a sweep",
            "models",
            "allocated in a step, MB",
            ((1, 2, 4, 8, 16), (1, 2, 4, 8)),
            models,
        ),
    )
}


def pair(
    curve: str, x: float, ours: Callable[[], object], plain: Callable[[], object]
) -> Iterator[Point]:
    """Both measured in alternation, and what PyTorch allocates at the peak of one run."""
    runs = {"ours": ours, "plain": plain}
    taken = alternating(runs, rounds=5)
    for who, run in runs.items():
        yield Point(curve, x, who, taken[who], peak_added(run))


def alternating(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds by name; all have run once before."""
    for run in runs.values():
        run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            taken[name].append(clock(run))
    return {name: median(times) for name, times in taken.items()}
