"""How often kept tokens and prompt attention are on the needle, on the demo's test images.

``python -m benchmarks.demo_explanations --output demo-output --write`` uses the demo's images,
cache and run under the folder, or makes them (``fpt-fast demo``), and writes the table of
docs/explanation.md.  Every measure has its chance level beside it: the same measure with the
needle's box laid at every other place of the same image.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.marked_block import write_block
from fpt_fast.cache import CacheReader
from fpt_fast.demo.run import run_demo
from fpt_fast.images import load_image_set
from fpt_fast.images.store import DecodedStore
from fpt_fast.model import FptModel
from fpt_fast.pipeline.examples import make_examples
from fpt_fast.pipeline.features import FeaturePlan
from fpt_fast.records import TokenExample
from fpt_fast.report.maps import attention_by_head, kept_by_head

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "explanation.md"
START = "<!-- needles: written by benchmarks/demo_explanations.py -->"
END = "<!-- end of needles -->"
TENTH = 0.1

# A measure of a map [rows, columns] for every place (top, left) of a box of `shape` patches.
Measure = Callable[[Tensor, tuple[int, int]], Tensor]


def windows(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """[rows, columns] -> [tops, lefts, height, width]: every box of ``shape`` patches."""
    return values.unfold(0, shape[0], 1).unfold(1, shape[1], 1)


def centre(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """The value of a box's middle patch."""
    return windows(values, shape)[:, :, shape[0] // 2, shape[1] // 2]


def in_top_tenth(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Whether a box's middle patch is among the tenth of all patches with the highest values."""
    count = round(TENTH * values.numel())
    threshold = values.flatten().sort(descending=True).values[count - 1]
    return (centre(values, shape) >= threshold).float()


def has_highest(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Whether the patch with the highest value lies in a box."""
    highest = torch.zeros_like(values).flatten()
    highest[values.argmax()] = 1.0
    return windows(highest.view_as(values), shape).sum(dim=(2, 3))


def share_inside(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Share of all values that lies in a box."""
    return windows(values, shape).sum(dim=(2, 3)) / values.sum()


ROWS: tuple[tuple[str, str, Measure], ...] = (
    ("share of layers and heads that keep the needle's middle token", "kept", centre),
    (
        "needle's middle token in the tenth of tokens that most layers and heads keep",
        "kept",
        in_top_tenth,
    ),
    ("needle's middle token in the top tenth of prompt attention", "attention", in_top_tenth),
    ("the token looked at most lies in the needle", "attention", has_highest),
    ("share of prompt attention on the needle", "attention", share_inside),
)


def load_examples(output: Path, images: int, seed: int) -> tuple[list[TokenExample], list[Tensor]]:
    """Test images of the demo as explanations, and the needles' boxes in patches: top, left,
    height, width."""
    name = f"{images}-seed{seed}"
    data, cache = output / f"images-{name}", output / f"cache-{name}"
    model = FptModel.from_pretrained(output / "fpt_plus" / "best").eval()
    assert model.fusion is not None
    with (data / "boxes.csv").open() as file:
        boxes = {row["path"]: row for row in csv.DictReader(file)}
    items = load_image_set(data).of_split("test")
    store = DecodedStore()
    examples: list[TokenExample] = []
    with CacheReader(cache) as reader:
        plan = FeaturePlan.from_json(reader.fingerprint)
        for item in items:
            read = reader.read([reader.row(item.key)])
            images = [store.get(item)]
            examples += make_examples(
                [item], images, read, None, plan, model.fusion, num_classes=model.num_outputs
            )
    patches = []
    for example in examples:
        box = {key: int(value) for key, value in boxes[example.key].items() if key != "path"}
        height = example.pixels.shape[1] // example.grid[0]
        width = example.pixels.shape[2] // example.grid[1]
        top, left = box["top"] // height, box["left"] // width
        bottom = (box["top"] + box["height"] - 1) // height
        right = (box["left"] + box["width"] - 1) // width
        patches.append(torch.tensor([top, left, bottom - top + 1, right - left + 1]))
    return examples, patches


def measure(examples: list[TokenExample], boxes: list[Tensor]) -> dict[str, dict[str, float]]:
    """Each row's mean on the needles, and on all places of a box of their size."""
    found = {}
    for name, which, of in ROWS:
        here, anywhere = [], []
        for example, box in zip(examples, boxes, strict=True):
            by_head = kept_by_head(example) if which == "kept" else attention_by_head(example)
            top, left, height, width = box.tolist()
            values = of(by_head.float().mean(dim=(0, 1)), (height, width))
            here.append(float(values[top, left]))
            anywhere.append(float(values.mean()))
        found[name] = {
            "needle": sum(here) / len(here),
            "chance": sum(anywhere) / len(anywhere),
        }
    return found


def render(found: dict[str, dict[str, float]], images: int) -> str:
    """The block of the document."""
    lines = [
        f"On the {images} test images of `fpt-fast demo` (512 px, 32 x 32 patches, 20 % of the "
        "tokens kept; a needle of 24 to 40 px covers 3 or 4 patches a side):",
        "",
        "| | needle | chance |",
        "| --- | --- | --- |",
        *(f"| {name} | {row['needle']:.1%} | {row['chance']:.1%} |" for name, row in found.items()),
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure; prints JSON, and with --write writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if not (given.output / "demo.json").is_file():
        run_demo(given.output, images=given.images, seed=given.seed)
    examples, boxes = load_examples(given.output, given.images, given.seed)
    found = measure(examples, boxes)
    if given.write:
        write_block(DOCUMENT, START, END, render(found, len(examples)))
    sys.stdout.write(json.dumps({"images": len(examples), **found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
