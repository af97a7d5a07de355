"""Explanations: for any image, what was kept of it and where the prompts look."""

import csv
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpt_fast.config import ConfigError
from fpt_fast.files import output_folder, require_free_folder, write_atomically
from fpt_fast.images import DecodedStore, labels_of, to_network_input
from fpt_fast.model import FptModel
from fpt_fast.ops import quantise_kv
from fpt_fast.pipeline.examples import make_examples
from fpt_fast.pipeline.features import load_recorded_backbone
from fpt_fast.pipeline.recorded import RecordedRun, open_images, read_recorded_run
from fpt_fast.pipeline.said import said_cells, said_columns
from fpt_fast.pipeline.temperatures import require_temperatures
from fpt_fast.records import (
    FeatureBatch,
    ImageItem,
    Predictions,
    SelectedTokens,
    TokenExample,
)
from fpt_fast.report.maps import attention_by_head, kept_by_head
from fpt_fast.report.sheets import WHAT, draw_heads, draw_sheet
from fpt_fast.setting_values import build_settings
from fpt_fast.settings import ExplainSettings
from fpt_fast.trainer import resolve_device

TABLE_FILE = "explanations.csv"

# An example, and what the model says of it: names of columns, cells.
Explained = tuple[TokenExample, list[str], list[str]]


@dataclass(frozen=True, slots=True)
class ExplainResult:
    """Explained images in the order given, the class names, and the folder with the pictures."""

    examples: tuple[TokenExample, ...]
    classes: tuple[str, ...]
    output: Path | None


def explain(settings: ExplainSettings | None = None, **values: Any) -> ExplainResult:
    """Explain images with a trained run; see ``ExplainSettings`` for the arguments.

    ``output`` gets ``explanations.csv`` (with what ``predict`` says of the image) and a folder an
    image: ``kept.png`` and ``attention.png``
    over all layers and heads, ``heads-kept.png`` and ``heads-attention.png`` by layer (row) and
    head (column), and ``arrays.npz`` (see ``explanation_arrays``).  Raises ``ConfigError`` for a
    run of a side network alone, which keeps nothing, and ``FileExistsError`` where ``output`` is
    not empty and not to be replaced.
    """
    settings = settings or build_settings(ExplainSettings, values)
    if settings.output is not None:
        require_free_folder(settings.output, TABLE_FILE, overwrite=settings.overwrite)
    run = read_recorded_run(settings.run)
    if run.model.fusion is None:
        raise ConfigError(
            f"{settings.run} is a side network alone: it keeps no tokens and has no prompts"
        )
    items = open_images(
        settings.images,
        run.classes,
        run.plan.reading,
        several=run.several,
        skip_unreadable=settings.skip_unreadable,
        workers=settings.workers,
    )
    explained = _explained(settings, run, items)
    if settings.output is None:
        examples = tuple(example for example, _, _ in explained)
    else:
        with output_folder(settings.output):
            examples = tuple(_written(settings.output, explained, run.classes))
    return ExplainResult(examples, run.classes, settings.output)


def _written(
    output: Path, explained: Iterable[Explained], classes: Sequence[str]
) -> Iterator[TokenExample]:
    """The examples, once pictures, arrays and a row of the table are written."""
    header: list[str] = []
    rows: list[list[str]] = []
    for number, (example, columns, cells) in enumerate(explained):
        header = ["path", "folder", *columns, *_LOOKED_AT]
        folder = f"{number:04d}-{Path(example.key).stem}"
        _write_pictures(output / folder, example, _in_words(example, classes))
        rows.append([example.key, folder, *cells, *_looked_at(example)])
        yield example
    with write_atomically(output / TABLE_FILE) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def explanation_arrays(example: TokenExample) -> dict[str, np.ndarray[Any, Any]]:
    """An explanation as arrays.

    ``layers`` [L]; ``kept`` [L, H, rows, columns] bool; ``attention`` [L, H, rows, columns] f32,
    the mean of the prompts; ``index`` [L, H, K] i32 and ``weights`` [L, H, P, K] f32, what both
    were made from; ``probabilities`` [classes] f32, or for a regression ``output`` [1] f64.
    """
    weights = example.weights if example.weights is not None else torch.empty(0)
    if example.output is None:
        said = {"probabilities": example.probabilities.numpy()}
    else:
        said = {"output": np.array([example.output])}
    return {
        "layers": np.array(example.layers),
        "kept": kept_by_head(example).numpy(),
        "attention": attention_by_head(example).numpy(),
        "index": example.index.numpy(),
        "weights": weights.numpy(),
        **said,
    }


def _explained(
    settings: ExplainSettings, run: RecordedRun, items: Sequence[ImageItem]
) -> Iterator[Explained]:
    plan, model = run.plan, run.model.to(resolve_device(settings.device)).eval()
    assert model.fusion is not None
    temperature = torch.ones(())
    if settings.calibrated:
        temperature = require_temperatures(settings.run, model.extra)
    backbone = load_recorded_backbone(
        plan,
        backbone=settings.backbone,
        checkpoint_path=settings.checkpoint_path,
        dtype=settings.dtype,
        device=settings.device,
        attention=settings.attention,
    )
    frozen = plan.frozen_pass(backbone)
    store = DecodedStore(limit_bytes=0)
    for first in range(0, len(items), settings.batch_size):
        chunk = items[first : first + settings.batch_size]
        images = [store.get(item) for item in chunk]
        selected = frozen.select(
            torch.stack([to_network_input(image, plan.preprocessing) for image in images])
        )
        if plan.features != "float16":
            kv, k_scales, v_scales = quantise_kv(selected.kv, getattr(torch, plan.features))
            selected = SelectedTokens(kv, selected.index, k_scales, v_scales)
        said = _predict(model, run, images, selected, chunk, temperature)
        examples = make_examples(
            chunk, images, selected, said, plan, model.fusion, num_classes=len(run.classes)
        )
        columns = said_columns(said, run.classes)
        for example, cells in zip(examples, said_cells(said, run.classes), strict=True):
            yield example, columns, cells


@torch.no_grad()
def _predict(
    model: FptModel,
    run: RecordedRun,
    images: Sequence[Tensor],
    selected: SelectedTokens,
    items: Sequence[ImageItem],
    temperature: Tensor,
) -> Predictions:
    """What the model says of the images, on the CPU."""
    side = dataclasses.replace(run.plan.preprocessing, size=model.config.side_size)
    pixels = torch.stack([to_network_input(image, side) for image in images])
    batch = FeatureBatch(
        side_pixels=pixels.to(selected.kv.device),
        kv=selected.kv,
        rows=None,
        labels=labels_of(items),
        keys=tuple(item.key for item in items),
        k_scales=selected.k_scales,
        v_scales=selected.v_scales,
    )
    logits: Tensor = model(batch).float().cpu()
    if run.target is not None:
        mean, deviation = run.target
        unknown = torch.full((len(items),), torch.nan, dtype=torch.float64)
        return Predictions(batch.keys, unknown, logits.double() * deviation + mean, None)
    if run.regression:
        return Predictions(batch.keys, batch.labels, logits, None, run.cuts)
    logits = logits / temperature
    probabilities = logits.sigmoid() if run.several else logits.softmax(dim=1)
    return Predictions(batch.keys, batch.labels, logits, probabilities)


_LOOKED_AT = ("top", "left", "height", "width", "attention")


def _looked_at(example: TokenExample) -> list[str]:
    """The patch looked at most, in pixels of the frozen model's input, and its attention."""
    attention = attention_by_head(example).mean(dim=(0, 1))
    row, column = divmod(int(attention.argmax()), example.grid[1])
    height = example.pixels.shape[1] // example.grid[0]
    width = example.pixels.shape[2] // example.grid[1]
    box = (row * height, column * width, height, width)
    return [*map(str, box), f"{float(attention.max()):.6f}"]


def _in_words(example: TokenExample, classes: Sequence[str]) -> str:
    """What the model says of an image, below its name."""
    if example.output is not None:
        if example.grade is None:
            return f"{classes[0]}: {example.output:.5g}"
        return f"predicted {classes[example.grade]} (grade {example.output:.2f})"
    shares = example.probabilities.tolist()
    named = [f"{name} {share:.1%}" for name, share in zip(classes, shares, strict=True)]
    if not example.findings:
        return f"predicted {named[int(example.probabilities.argmax())]}"
    called = [name for name, share in zip(named, shares, strict=True) if share >= 0.5]
    others = [name for name, share in zip(named, shares, strict=True) if share < 0.5]
    parts = [f"called: {', '.join(called) or 'none'}"]
    return "; ".join([*parts, *([f"not called: {', '.join(others)}"] if others else [])])


def _write_pictures(folder: Path, example: TokenExample, said: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for what in WHAT:
        (folder / f"{what}.png").write_bytes(draw_sheet(example, what, said))
        (folder / f"heads-{what}.png").write_bytes(draw_heads(example, what, said))
    # Newer numpy types its own keywords, which no array here is named like.
    arrays: dict[str, Any] = explanation_arrays(example)
    np.savez_compressed(folder / "arrays.npz", **arrays)
