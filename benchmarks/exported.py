"""A run as a file for other programs, beside the library itself: size, speed, and agreement.

    python -m benchmarks.exported --output OUTPUT --write

Trains FPT+ for one epoch on a few images of 512 px with a ViT-B of random weights (``--tiny``:
timm's ``test_vit``, 64 px), which costs what trained weights cost, and exports it as ONNX and as a
program of torch.export.  One image goes in turns through each file, through the same plain
operations in PyTorch, and through ``Predictor`` in f32 and in the dtype that it would choose; one
thread, the least processor time of the rounds.  Prints JSON, also in OUTPUT/exported.json;
``--write`` puts it into benchmarks/results/exported.json and docs/prediction.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.marked_block import Published
from benchmarks.turns import best_times, processor
from fpt_fast.demo.tasks import make_task
from fpt_fast.images import to_network_input
from fpt_fast.pipeline import ExportSettings, Predictor, export, preload, train
from fpt_fast.pipeline.exporting import portable
from fpt_fast.pipeline.recorded import read_recorded_run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "exported.json"
DOCUMENT = ROOT / "docs" / "prediction.md"
START = "<!-- exported: written by benchmarks/exported.py -->"
END = "<!-- end of exported -->"
NOT_YET = (
    "Not measured yet at 512 px with a ViT-B: `python -m benchmarks.exported "
    "--output demo-output/exported --write`\n"
    "writes size and speed of both files beside the library's own here."
)
MODEL, TINY_MODEL = "vit_base_patch16_384", "test_vit"
# The least for three classes in three splits.
IMAGES = 20
WAYS = {
    "predictor": "`Predictor`",
    "predictor_f32": "`Predictor`, f32",
    "plain": "the exported operations in PyTorch, f32",
    "onnx": "ONNX in onnxruntime, f32",
    "program": "program of torch.export, f32",
}


def make_run(output: Path, *, tiny: bool) -> tuple[Path, dict[str, Any]]:
    """A run of one epoch below ``output``, and where its frozen model is."""
    size = 64 if tiny else 512
    make_task("textures", output / "images", images=IMAGES, size=size)
    name, weights = TINY_MODEL if tiny else MODEL, output / "random.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        save_file(timm.create_model(name).state_dict(), weights)
    frozen: dict[str, Any] = {"backbone": name, "checkpoint_path": weights}
    preload(
        data=output / "images",
        cache=output / "cache",
        input_size=str(size),
        normalization="backbone",
        **frozen,
    )
    sides = {"side_size": "32"} if tiny else {}
    train(
        data=output / "images",
        cache=str(output / "cache"),
        run=output / "run",
        epochs=1,
        overwrite=True,
        **sides,
    )
    return output / "run", frozen


def open_onnx(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """As another program would, with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def apply(frozen: Tensor, side: Tensor) -> Tensor:
        named = {"frozen_pixels": frozen.numpy(), "side_pixels": side.numpy()}
        return torch.from_numpy(session.run(None, named)[0])

    return apply


def open_program(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """As another program would."""
    module = torch.export.load(path).module()
    return lambda frozen, side: module(frozen, side)


def measure(output: Path, *, tiny: bool, rounds: int) -> dict[str, Any]:
    """Bytes of the files; of each way, processor seconds and the largest difference of a
    probability from ``Predictor`` in f32."""
    folder, frozen = make_run(output, tiny=tiny)
    onnx, program = output / "model.onnx", output / "model.pt2"
    settings = ExportSettings(run=folder, output=onnx, **frozen)
    export(replace(settings, overwrite=True))
    export(replace(settings, output=program, format="program", overwrite=True))

    run = read_recorded_run(folder)
    shape = (3, *run.plan.preprocessing.size)
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    side = replace(run.plan.preprocessing, size=run.model.config.side_size)
    pixels = [to_network_input(image, of)[None] for of in (run.plan.preprocessing, side)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        by_file = {
            "plain": portable(run, settings),
            "onnx": open_onnx(onnx),
            "program": open_program(program),
        }
        by_library = {
            "predictor": Predictor(folder, **frozen),
            "predictor_f32": Predictor(folder, dtype="float32", **frozen),
        }
        ways: dict[str, Callable[[], Tensor]] = {
            **{name: _bound(model, *pixels) for name, model in by_file.items()},
            **{name: _predicting(model, image) for name, model in by_library.items()},
        }
        with torch.no_grad():
            told = {name: way() for name, way in ways.items()}
            seconds = best_times(ways, rounds, time.process_time)
    finally:
        torch.set_num_threads(threads)
    return {
        "model": TINY_MODEL if tiny else MODEL,
        "size": shape[1],
        "machine": processor(),
        "rounds": rounds,
        "bytes": {"onnx": onnx.stat().st_size, "program": program.stat().st_size},
        "seconds": {name: seconds[name] for name in WAYS},
        "difference": {
            name: float((told[name] - told["predictor_f32"]).abs().max()) for name in WAYS
        },
    }


def _bound(model: Callable[..., Tensor], *pixels: Tensor) -> Callable[[], Tensor]:
    return lambda: model(*pixels)


def _predicting(predictor: Predictor, image: Tensor) -> Callable[[], Tensor]:
    return lambda: predictor([image]).probabilities


def render(found: dict[str, Any]) -> str:
    """The block of the document."""
    lines = [
        f"One image of {found['size']} px, {found['model']}, FPT+, one thread of "
        f"{found['machine']}, no GPU; the least processor time of {found['rounds']} rounds in "
        "turns, and the largest difference of a probability from `Predictor` in f32:",
        "",
        "| by | seconds | file, MB | difference |",
        "| --- | --- | --- | --- |",
    ]
    for name, words in WAYS.items():
        size = f"{found['bytes'][name] / 1e6:.0f}" if name in found["bytes"] else ""
        # The others differ from this one.
        difference = "" if name == "predictor_f32" else f"{found['difference'][name]:.0e}"
        lines.append(f"| {words} | {found['seconds'][name]:.2f} | {size} | {difference} |")
    return "\n".join(lines)


def main() -> int:
    """Run everything; prints JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.write and given.tiny:
        parser.error("--write is for the full size; leave out --tiny")
    found = measure(given.output, tiny=given.tiny, rounds=given.rounds)
    text = json.dumps(found, indent=1) + "\n"
    (given.output / "exported.json").write_text(text, encoding="utf-8")
    if given.write:
        Published(RESULTS, DOCUMENT, START, END, render).write(found)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
