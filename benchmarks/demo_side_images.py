"""Test AUC of the demo with stored and with exact side images, for several seeds.

``python benchmarks/demo_side_images.py --output demo-output`` makes the demo's images and cache
(or uses those that are there), trains FPT+ both ways for every seed, and prints one line of JSON
a run and one of both means.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from fpt_fast.demo.run import LEARNING_RATE, SIDE_SIZE, make_demo_cache
from fpt_fast.pipeline import train

MODES = ("stored", "exact")


def measure(output: Path, images: int, epochs: int, seeds: range) -> dict[str, list[float]]:
    """AUC by mode, one a seed; the modes alternate."""
    data, cache = make_demo_cache(output, images=images, seed=0)
    aucs: dict[str, list[float]] = {mode: [] for mode in MODES}
    for seed in seeds:
        for mode in MODES:
            started = time.monotonic()
            trained = train(
                data=data,
                cache=str(cache),
                run=output / f"side-images-{mode}-{seed}",
                side_images=mode,
                side_size=str(SIDE_SIZE),
                epochs=epochs,
                learning_rate=LEARNING_RATE,
                seed=seed,
                overwrite=True,
            )
            auc = trained.metrics.values["auc"]
            aucs[mode].append(auc)
            seconds = round(time.monotonic() - started, 1)
            print(json.dumps({"side_images": mode, "seed": seed, "auc": auc, "seconds": seconds}))
    return aucs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    aucs = measure(given.output, given.images, given.epochs, range(given.seeds))
    print(
        json.dumps(
            {
                "mean_auc": {mode: statistics.mean(values) for mode, values in aucs.items()},
                "spread": {mode: statistics.pstdev(values) for mode, values in aucs.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
