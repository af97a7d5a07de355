"""Prediction: images in, classes and probabilities out, with no cache."""

import csv
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpt_fast.config import ConfigError
from fpt_fast.distributed import refuse_several
from fpt_fast.files import write_atomically
from fpt_fast.images import DecodedStore
from fpt_fast.loader import FeatureLoader, FeatureSource, LiveFeatures, NoFeatures
from fpt_fast.metrics import predicted_classes
from fpt_fast.model import FptModel
from fpt_fast.peers import PeerModel
from fpt_fast.pipeline.features import FeaturePlan, load_recorded_backbone
from fpt_fast.pipeline.peers import is_peer_folder, load_peer
from fpt_fast.pipeline.recorded import open_images
from fpt_fast.pipeline.run_folder import model_folder, read_best_model
from fpt_fast.records import ImageItem, Predictions, Preprocessing, Reading
from fpt_fast.setting_values import build_settings
from fpt_fast.settings import PredictSettings
from fpt_fast.trainer import predict as predict_batches

log = logging.getLogger("fpt_fast")


@dataclass(frozen=True, slots=True)
class PredictResult:
    """Predictions of unlabelled images, the class names, and the CSV file that holds them."""

    predictions: Predictions
    classes: tuple[str, ...]
    output: Path


def predict(settings: PredictSettings | None = None, **values: Any) -> PredictResult:
    """Classify images with a trained run; see ``PredictSettings`` for the arguments.

    Raises ``CacheMismatch`` where the frozen model found has other weights than the run's.
    """
    refuse_several("prediction")
    settings = settings or build_settings(PredictSettings, values)
    try:
        model, features, side, reading = _open_model(settings)
        classes = tuple(model.extra["classes"])
    except KeyError as error:
        raise ConfigError(
            f"{settings.run} lacks {error.args[0]!r}; it was not written by fpt-fast train"
        ) from error
    items = open_images(
        settings.images,
        classes,
        reading,
        several=model.extra.get("task") == "multilabel",
        skip_unreadable=settings.skip_unreadable,
        workers=settings.workers,
    )
    loader = FeatureLoader(
        items,
        features,
        side,
        batch_size=settings.batch_size,
        # Every image is looked at once: nothing is worth keeping.
        store=DecodedStore(limit_bytes=0),
        # The frozen pass uses every core itself; a second thread decodes meanwhile.
        workers=1 if features.needs_images else settings.workers,
    )
    predictions = predict_batches(
        model,
        loader,
        device=settings.device,
        regression=bool(model.extra.get("regression", False)),
        progress=True,
    )
    _write_csv(settings.output, items, predictions, classes)
    return PredictResult(predictions, classes, settings.output)


def _open_model(
    settings: PredictSettings,
) -> tuple[FptModel | PeerModel, FeatureSource, Preprocessing, Reading]:
    """The run's best model, where its features come from, and how images are prepared for it."""
    folder = model_folder(settings.run)
    backbone, weights = settings.backbone, settings.checkpoint_path
    if is_peer_folder(folder):
        peer, peer_plan = load_peer(folder, backbone=backbone, checkpoint_path=weights)
        return peer, NoFeatures(), peer_plan.preprocessing, peer_plan.reading
    model = read_best_model(settings.run)
    plan = FeaturePlan.from_json(model.extra["features"])
    side = dataclasses.replace(plan.preprocessing, size=model.config.side_size)
    if not model.config.fusion:
        return model, NoFeatures(), side, plan.reading
    frozen = load_recorded_backbone(
        plan,
        backbone=backbone,
        checkpoint_path=weights,
        dtype=settings.dtype,
        device=settings.device,
        attention=settings.attention,
    )
    return model, LiveFeatures(plan.frozen_pass(frozen)), side, plan.reading


def _write_csv(
    output: Path, items: Sequence[ImageItem], predictions: Predictions, classes: tuple[str, ...]
) -> None:
    """Write path, predicted class and one probability per class (a grade for a regression);
    of several findings those called, with semicolons between them."""
    probabilities = predictions.probabilities
    rows: list[list[str]] = []
    if probabilities is None:
        header = ["path", "predicted", "grade"]
        grades = predicted_classes(predictions, len(classes)).tolist()
        logits = predictions.logits.squeeze(1).tolist()
        for item, grade, logit in zip(items, grades, logits, strict=True):
            rows.append([str(item.path), classes[grade], f"{logit:.6f}"])
    else:
        header = ["path", "predicted", *(f"probability_{name}" for name in classes)]
        best = predicted_classes(predictions, len(classes)).tolist()
        for item, winner, values in zip(items, best, probabilities.tolist(), strict=True):
            called = (
                classes[winner]
                if isinstance(winner, int)
                else ";".join(name for name, is_so in zip(classes, winner, strict=True) if is_so)
            )
            rows.append([str(item.path), called, *(f"{value:.6f}" for value in values)])
    with write_atomically(output) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
