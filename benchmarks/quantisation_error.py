"""What 8-bit features change: ``python -m benchmarks.quantisation_error --demo demo-output``.

Errors of keys, values, attention and logits for every stored dtype, on features drawn at random
at the published sizes and, with ``--demo`` (a folder that ``fpt-fast demo`` wrote), on the test
images and the trained model of the demo.  ``--write`` puts the tables into docs/8-bit-features.md.
"""

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.cases import FULL_PROMPT_CASES, PromptCase, vit_b
from benchmarks.marked_block import write_block
from fpt_fast.config import fpt_plus
from fpt_fast.metrics import compute_metrics
from fpt_fast.model import FptModel
from fpt_fast.ops import dequantise_kv, prompt_attention, quantise_kv
from fpt_fast.pipeline.evaluation import read_run_settings
from fpt_fast.pipeline.inputs import make_loader, reopen_inputs
from fpt_fast.pipeline.run_folder import BEST
from fpt_fast.records import FeatureBatch, Predictions

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "8-bit-features.md"
START = "<!-- tables: written by benchmarks/quantisation_error.py -->"
END = "<!-- end of tables -->"
STORED = (torch.float16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
VIT_B = vit_b(384)
HEAD = ("features", "MB an image", "keys", "values", "attention", "logits", "probabilities, most")


def random_features(case: PromptCase) -> Tensor:
    """f32 [B, L, 2, H, K, D] with what makes a trained transformer's hard to store in few bits.

    Keys: channels of log-normal size around offsets of their own, one channel in 32 with an
    offset ten times as large.  Values: tokens of log-normal size.  All heavy-tailed (Student's t,
    5 degrees of freedom).
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    place = (case.layers, case.heads)
    shape = (case.images, *place, case.kept, case.width)

    def heavy() -> Tensor:
        squares = torch.stack([normal(*shape).square() for _ in range(5)]).mean(0)
        return normal(*shape) / squares.sqrt()

    sizes = normal(*place, 1, case.width).mul(0.5).exp()
    offsets = normal(*place, 1, case.width) * sizes
    offsets[..., ::32] *= 10
    keys = offsets + sizes * heavy()
    values = heavy() * normal(case.images, *place, case.kept, 1).mul(0.5).exp()
    return torch.stack([keys, values], dim=2)


def random_batch(case: PromptCase) -> FeatureBatch:
    """Random features beside random side images."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(case.images, 3, *fpt_plus().side_size, generator=generator)
    keys = tuple(str(image) for image in range(case.images))
    labels = torch.zeros(case.images, dtype=torch.int64)
    return FeatureBatch(pixels, random_features(case), None, labels, keys)


def random_model() -> FptModel:
    """FPT+ on ViT-B; prompts of size 1, since untrained ones look at every token alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FptModel(fpt_plus(), VIT_B, 5)
        assert model.fusion is not None
        nn.init.normal_(model.fusion.prompts)
    return model.eval()


def stored_as(batch: FeatureBatch, dtype: torch.dtype) -> FeatureBatch:
    """The batch as a cache of ``dtype`` would give it."""
    assert batch.kv is not None
    if dtype.itemsize > 1:
        return dataclasses.replace(batch, kv=batch.kv.to(dtype))
    kv8, k_scales, v_scales = quantise_kv(batch.kv, dtype)
    return dataclasses.replace(batch, kv=kv8, k_scales=k_scales, v_scales=v_scales)


def with_other_images(batch: FeatureBatch) -> FeatureBatch:
    """Every image with its neighbour's features: what the logits owe to them."""
    assert batch.kv is not None
    return dataclasses.replace(batch, kv=batch.kv.roll(1, dims=0))


def wide(batch: FeatureBatch) -> Tensor:
    """The features that the batch stands for, in f32."""
    assert batch.kv is not None
    if batch.k_scales is None or batch.v_scales is None:
        return batch.kv.float()
    return dequantise_kv(batch.kv, batch.k_scales, batch.v_scales)


def outcome(model: FptModel, batch: FeatureBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys, values, attention of the prompts, and logits; images first."""
    assert model.fusion is not None and batch.kv is not None
    scales = (
        None
        if batch.k_scales is None or batch.v_scales is None
        else (batch.k_scales, batch.v_scales)
    )
    attended = prompt_attention(model.fusion.queries(), batch.kv, None, scales)
    keys, values = wide(batch).unbind(dim=2)
    return keys, values, attended.transpose(0, 1), model(batch)


class Errors:
    """Relative errors (root of summed squares) over all batches, and the largest change of a
    probability."""

    def __init__(self) -> None:
        self._difference = [0.0] * 4
        self._whole = [0.0] * 4
        self._most = 0.0
        self.logits: list[Tensor] = []
        self.size = 0.0  # bytes an image

    def add(
        self, batch: FeatureBatch, got: tuple[Tensor, ...], expected: tuple[Tensor, ...]
    ) -> None:
        """One batch."""
        stored = [x for x in (batch.kv, batch.k_scales, batch.v_scales) if x is not None]
        self.size = sum(x.nbytes for x in stored) / len(batch.labels)
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            self._difference[i] += float(torch.linalg.vector_norm(one - other)) ** 2
            self._whole[i] += float(torch.linalg.vector_norm(other)) ** 2
        change = got[-1].softmax(dim=1) - expected[-1].softmax(dim=1)
        self._most = max(self._most, float(change.abs().max()))
        self.logits.append(got[-1])

    def cells(self) -> list[str]:
        """Keys, values, attention, logits, probabilities."""
        relative = [
            (difference / whole) ** 0.5
            for difference, whole in zip(self._difference, self._whole, strict=True)
        ]
        return [f"{error:.2g}" for error in relative] + [f"{self._most:.2g}"]


@torch.no_grad()
def compare(model: FptModel, batches: Iterable[FeatureBatch]) -> dict[torch.dtype | None, Errors]:
    """Errors of every stored dtype against the features as they come, None: of other images."""
    errors = {dtype: Errors() for dtype in (*STORED, None)}
    for given in batches:
        assert given.kv is not None
        batch = dataclasses.replace(given, kv=given.kv.float())
        expected = outcome(model, batch)
        for dtype, of_dtype in errors.items():
            other = with_other_images(batch) if dtype is None else stored_as(batch, dtype)
            of_dtype.add(other, outcome(model, other), expected)
    return errors


def rows(errors: dict[torch.dtype | None, Errors]) -> Iterator[list[str]]:
    """Cells of the table."""
    for dtype, of_dtype in errors.items():
        if dtype is None:
            yield ["another image's", "", *of_dtype.cells()]
        else:
            name = str(dtype).removeprefix("torch.")
            yield [name, f"{of_dtype.size / 1e6:.2f}", *of_dtype.cells()]


def table(head: Iterable[str], body: Iterable[list[str]]) -> str:
    """Markdown."""
    head = list(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *body])


def random_table() -> str:
    """Of random features at the published sizes."""
    case = FULL_PROMPT_CASES[0]
    errors = compare(random_model(), [random_batch(case)])
    return (
        f"Random features, {case.images} images, FPT+ on ViT-B (K = {case.kept}, "
        f"D = {case.width}), random weights:\n\n{table(HEAD, rows(errors))}"
    )


def demo_table(folder: Path) -> str:
    """Of the demo's test images, by its trained model."""
    run = folder / "fpt_plus"
    settings = read_run_settings(run)
    model = FptModel.from_pretrained(run / BEST)
    with ExitStack() as stack:
        inputs = reopen_inputs(settings, stack, model, backbone=None, checkpoint_path=None)
        batches = list(make_loader(inputs, settings, "test"))
    errors = compare(model, batches)
    labels = torch.cat([batch.labels for batch in batches])
    keys = tuple(key for batch in batches for key in batch.keys)
    body = list(rows(errors))
    for cells, of_dtype in zip(body, errors.values(), strict=True):
        logits = torch.cat(of_dtype.logits)
        predictions = Predictions(keys, labels, logits, torch.softmax(logits, dim=1))
        metrics = compute_metrics(predictions, model.num_outputs)
        cells.append(f"{metrics.values['auc']:.4f}")
    return (
        f"The demo's {len(keys)} test images (its cache is f16, so that row is exact), trained "
        f"model:\n\n{table((*HEAD, 'test AUC'), body)}"
    )


def main() -> None:
    """Print the tables, or write them into the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, help="a folder that `fpt-fast demo` wrote")
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    given = parser.parse_args()
    text = random_table()
    if given.demo is not None:
        text += f"\n\n{demo_table(given.demo)}"
    if not given.write:
        print(text)
        return
    write_block(DOCUMENT, START, END, text)


if __name__ == "__main__":
    main()
