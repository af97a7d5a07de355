"""Accuracy of 8-bit features: the demo's task from f16, int8 and fp8 features of one preload.

    python -m benchmarks.demo_int8 --output demo-output --write

What an earlier demo left in OUTPUT (images, f16 cache) is used again.  The f16 cache is converted,
and FPT+ is trained from each with the same seed.  Prints, and writes to OUTPUT/demo_int8.json:
bytes of a record against the f32 file that the authors' code writes for an image, test AUC with
its bootstrap interval, and the interval of the paired difference to f16.  ``--write`` puts it into
benchmarks/results/demo_int8.json and docs/8-bit-features.md; with ``--results FILE`` that of an
earlier run, and nothing is run.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save
from sklearn.metrics import roc_auc_score

from benchmarks.marked_block import Published
from fpt_fast.cache import CacheReader
from fpt_fast.demo.run import LEARNING_RATE, SIDE_SIZE, make_demo_cache
from fpt_fast.pipeline import convert, train

DTYPES = ("float16", "int8", "float8_e4m3fn")
RESAMPLES = 2000
ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo_int8.json"
DOCUMENT = ROOT / "docs" / "8-bit-features.md"
START = "<!-- demo: written by benchmarks/demo_int8.py -->"
END = "<!-- end of demo -->"


def caches(output: Path, images: int, seed: int) -> tuple[Path, dict[str, Path]]:
    """The data, and a cache of each dtype, all from one preload; named as the demo names them."""
    data, cache = make_demo_cache(output, images=images, seed=seed)
    found = {"float16": cache}
    for dtype in DTYPES[1:]:
        found[dtype] = output / f"{cache.name}-{dtype}"
        convert(source=cache, target=found[dtype], dtype=dtype)
    return data, found


def predicted(run: Path) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Labels [images] and probabilities [images, classes] of the test split, in key order."""
    with (run / "predictions.csv").open(encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["key"])
    columns = [name for name in rows[0] if name.startswith("probability_")]
    names = [name.removeprefix("probability_") for name in columns]
    labels = np.array([names.index(row["label"]) for row in rows])
    return labels, np.array([[float(row[name]) for name in columns] for row in rows])


def auc(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """As the library reports it: scikit-learn's, one class against the others."""
    if probabilities.shape[1] == 2:
        return float(roc_auc_score(labels, probabilities[:, 1]))
    return float(roc_auc_score(labels, probabilities, multi_class="ovr"))


def resamples(labels: NDArray[np.int64], seed: int = 0) -> list[NDArray[np.int64]]:
    """Draws of as many images, with replacement, that hold every class."""
    rng = np.random.default_rng(seed)
    draws = (rng.integers(0, len(labels), len(labels)) for _ in range(RESAMPLES))
    return [draw for draw in draws if len(set(labels[draw])) == len(set(labels))]


def interval(values: list[float]) -> list[float]:
    """2.5 and 97.5 per cent quantiles."""
    return [round(float(value), 4) for value in np.quantile(values, [0.025, 0.975])]


def f32_file_bytes(cache: Path) -> int:
    """Bytes of the file that the authors' code writes for one image: f32 keys and values."""
    with CacheReader(cache) as reader:
        kv = reader.read([0]).kv[0].float()  # [L, 2, H, K, D]
    return len(save({"key_states": kv[:, 0].contiguous(), "value_states": kv[:, 1].contiguous()}))


def compare(output: Path, images: int, epochs: int, seed: int) -> dict[str, Any]:
    """Train from each dtype; sizes, AUC and its differences."""
    data, of_dtype = caches(output, images, seed)
    f32 = f32_file_bytes(of_dtype["float16"])
    found: dict[str, Any] = {"images": images, "epochs": epochs, "f32_file_bytes": f32}
    bootstrapped: dict[str, list[float]] = {}
    for dtype, cache in of_dtype.items():
        run = output / f"demo_int8-{dtype}"
        trained = train(
            data=data,
            cache=str(cache),
            run=run,
            side_size=str(SIDE_SIZE),
            epochs=epochs,
            learning_rate=LEARNING_RATE,
            seed=seed,
            overwrite=True,
        )
        labels, probabilities = predicted(run)
        # The rounding of the file's probabilities must not change the figure.
        assert abs(auc(labels, probabilities) - trained.metrics.values["auc"]) < 1e-3
        draws = resamples(labels)
        bootstrapped[dtype] = [auc(labels[draw], probabilities[draw]) for draw in draws]
        with CacheReader(cache) as reader:
            record = reader.layout.record_bytes
        differences = np.subtract(bootstrapped[dtype], bootstrapped["float16"]).tolist()
        found[dtype] = {
            "record_bytes": record,
            "f32 file / record": round(f32 / record, 3),
            "test_images": len(labels),
            "auc": round(auc(labels, probabilities), 4),
            "auc_interval": interval(bootstrapped[dtype]),
            "difference_interval": interval(differences),
        }
    return found


def render(found: dict[str, Any]) -> str:
    """The block of the document."""
    lines = [
        f"The demo, trained from each dtype with one seed ({found['images']} images, "
        f"{found['epochs']} epochs, {found['float16']['test_images']} test images; intervals of "
        f"95 % by {RESAMPLES} bootstrap samples of the test images, the difference paired):",
        "",
        "| features | f32 file / record | test AUC | interval | less that of f16: interval |",
        "| --- | --- | --- | --- | --- |",
    ]
    for dtype in DTYPES:
        of = found[dtype]
        low, high = of["auc_interval"]
        less, more = of["difference_interval"]
        difference = "" if dtype == "float16" else f"{less:+.4f} to {more:+.4f}"
        lines.append(
            f"| {dtype} | {of['f32 file / record']:.2f} | {of['auc']:.4f} "
            f"| {low:.4f} to {high:.4f} | {difference} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run everything; prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="of an earlier run, to be written")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    if given.results:
        found = json.loads(given.results.read_text(encoding="utf-8"))
    else:
        found = compare(given.output, given.images, given.epochs, given.seed)
    text = json.dumps(found, indent=1) + "\n"
    if not given.results:
        (given.output / "demo_int8.json").write_text(text, encoding="utf-8")
    if given.write:
        Published(RESULTS, DOCUMENT, START, END, render).write(found)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
