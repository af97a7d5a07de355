"""The demo from end to end: images, cache, FPT+, two comparisons, report, one line of figures."""

import dataclasses
import importlib.util
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from tqdm import tqdm

from fpt_fast.backbone import load_backbone
from fpt_fast.demo.needle import make_needle_dataset
from fpt_fast.files import write_atomically
from fpt_fast.images import iter_image_batches, load_image_set
from fpt_fast.metrics import compute_metrics
from fpt_fast.pipeline import preload, train
from fpt_fast.records import ImageItem, Predictions, Preprocessing

log = logging.getLogger("fpt_fast")

BACKBONE = Path(__file__).parent / "backbone"
INPUT_SIZE = 512
SIDE_SIZE = 64
BATCH_SIZE = 8
LEARNING_RATE = 5e-3


@dataclass(frozen=True, slots=True)
class DemoResult:
    """Test AUC of FPT+, of its side network alone, and of linear probing; wall seconds; report."""

    images: int
    classes: int
    epochs: int
    fpt_plus_auc: float
    side_alone_auc: float
    linear_probe_auc: float
    seconds: float
    report: str

    def summary(self) -> str:
        """The demo's last words, on one line."""
        return (
            f"demo: fpt_plus_auc={self.fpt_plus_auc:.4f} "
            f"side_alone_auc={self.side_alone_auc:.4f} "
            f"linear_probe_auc={self.linear_probe_auc:.4f} seconds={self.seconds:.0f}"
        )


def run_demo(output: Path, *, images: int = 800, epochs: int = 20, seed: int = 0) -> DemoResult:
    """Make the images under ``output`` and run the whole method on them.

    What an earlier run left there is used again: images and cache are resumed, runs replaced.
    The figures go to ``output/demo.json``.
    """
    if importlib.util.find_spec("skimage") is None:
        raise ImportError(
            "the demo's textures come with scikit-image, which is not installed; "
            "pip install 'fpt-fast[demo]'"
        )
    started = time.monotonic()
    data, cache = make_demo_cache(output, images=images, seed=seed)
    aucs = {}
    for run, fusion in (("fpt_plus", True), ("side_alone", False)):
        trained = train(
            data=data,
            cache=str(cache),
            run=output / run,
            fusion=fusion,
            side_size=str(SIDE_SIZE),
            epochs=epochs,
            learning_rate=LEARNING_RATE,
            seed=seed,
            overwrite=True,
        )
        log.info("%s: %s", run, trained.metrics)
        aucs[run] = trained.metrics.values["auc"]
    probe = linear_probe_auc(data)
    report = output / "fpt_plus" / "report.html"
    log.info("report: %s", report)
    result = DemoResult(
        images=images,
        classes=len(load_image_set(data).classes),
        epochs=epochs,
        fpt_plus_auc=aucs["fpt_plus"],
        side_alone_auc=aucs["side_alone"],
        linear_probe_auc=probe,
        seconds=time.monotonic() - started,
        report=str(report),
    )
    with write_atomically(output / "demo.json") as file:
        json.dump(dataclasses.asdict(result), file, indent=1)
    return result


def make_demo_cache(output: Path, *, images: int, seed: int) -> tuple[Path, Path]:
    """The demo's images and their feature cache under ``output``; what is there is used again."""
    # Named by what makes them: other settings make other images, and need another cache.
    name = f"{images}-seed{seed}"
    data, cache = output / f"images-{name}", output / f"cache-{name}"
    make_needle_dataset(data, images=images, size=INPUT_SIZE, seed=seed)
    preload(
        data=data,
        backbone=str(BACKBONE),
        cache=cache,
        input_size=str(INPUT_SIZE),
        normalization="backbone",
    )
    return data, cache


def linear_probe_auc(data: Path) -> float:
    """Test AUC of a logistic regression on the frozen model's class token at full resolution."""
    dataset = load_image_set(data)
    backbone = load_backbone(BACKBONE)
    preprocessing = Preprocessing((INPUT_SIZE, INPUT_SIZE), backbone.spec.mean, backbone.spec.std)

    def features(items: tuple[ImageItem, ...]) -> Tensor:  # [images, C]
        batches = iter_image_batches(items, preprocessing, batch_size=BATCH_SIZE)
        total = -(-len(items) // BATCH_SIZE)
        return torch.cat(
            [
                backbone.features(batch.pixels).cpu()
                for _, batch in tqdm(batches, total=total, desc="linear probe", disable=None)
            ]
        )

    train_items, test_items = dataset.of_split("train"), dataset.of_split("test")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    probe.fit(features(train_items).numpy(), [item.label for item in train_items])
    logits = torch.from_numpy(probe.decision_function(features(test_items).numpy())).float()
    predictions = Predictions(
        keys=tuple(item.key for item in test_items),
        labels=torch.tensor([item.label for item in test_items]),
        logits=logits,
        probabilities=torch.softmax(logits, dim=1),
    )
    return float(compute_metrics(predictions, len(dataset.classes)).values["auc"])
