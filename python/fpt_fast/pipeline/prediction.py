"""Prediction: images in, classes and probabilities out, with no cache."""

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpt_fast.config import ConfigError
from fpt_fast.distributed import refuse_several
from fpt_fast.files import require_free_file, write_atomically
from fpt_fast.images import DecodedStore
from fpt_fast.loader import FeatureLoader, NoFeatures
from fpt_fast.pipeline.grades import cuts_of, target_of, with_cuts
from fpt_fast.pipeline.peers import is_peer_folder, load_peer
from fpt_fast.pipeline.predictor import Predictor
from fpt_fast.pipeline.recorded import open_images
from fpt_fast.pipeline.run_folder import members_of, model_folder
from fpt_fast.pipeline.said import said_cells, said_columns
from fpt_fast.records import ImageItem, Predictions, Reading
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

    ``Predictor`` does the same for images in memory, and stays loaded.  Raises ``CacheMismatch``
    where the frozen model found has other weights than the run's, ``FileExistsError`` where the
    output is there and is not to be replaced.
    """
    refuse_several("prediction")
    settings = settings or build_settings(PredictSettings, values)
    require_free_file(settings.output, overwrite=settings.overwrite)
    if _is_of_a_peer(settings.run):
        items, predictions, classes = _predict_peer(settings)
    else:
        items, predictions, classes = _predict(settings)
    _write_csv(settings.output, items, predictions, classes)
    return PredictResult(predictions, classes, settings.output)


def _is_of_a_peer(run: Path) -> bool:
    """Whether ``run`` is of another method than FPT and FPT+; those of a sweep must be named."""
    members = members_of(run)
    if not any(is_peer_folder(model_folder(member)) for member in members):
        return False
    # Of several, what to name instead is said.
    model_folder(run)
    return True


Predicted = tuple[tuple[ImageItem, ...], Predictions, tuple[str, ...]]


def _predict(settings: PredictSettings) -> Predicted:
    predictor = Predictor(
        [settings.run, *settings.ensemble],
        backbone=settings.backbone,
        checkpoint_path=settings.checkpoint_path,
        dtype=settings.dtype,
        attention=settings.attention,
        device=settings.device,
        views=settings.tta,
        calibrated=settings.calibrated,
    )
    items = _open_images(settings, predictor.classes, predictor.reading, predictor.several)
    predictions = predictor(
        [item.path for item in items],
        batch_size=settings.batch_size,
        workers=settings.workers,
        progress=True,
    )
    return items, predictions, predictor.classes


def _predict_peer(settings: PredictSettings) -> Predicted:
    """The same for a run of another method, which sees no features."""
    unused = [name for name in ("ensemble", "calibrated") if getattr(settings, name)]
    if unused or settings.tta != "one":
        raise ConfigError(
            f"{settings.run} was trained by another method than FPT and FPT+: leave out "
            "--ensemble, --tta and --calibrated"
        )
    model, plan = load_peer(
        model_folder(settings.run),
        backbone=settings.backbone,
        checkpoint_path=settings.checkpoint_path,
    )
    try:
        classes = tuple(model.extra["classes"])
    except KeyError as error:
        raise ConfigError(
            f"{settings.run} lacks {error.args[0]!r}; it was not written by fpt-fast train"
        ) from error
    several = model.extra.get("task") == "multilabel"
    items = _open_images(settings, classes, plan.reading, several)
    loader = FeatureLoader(
        items,
        NoFeatures(),
        plan.preprocessing,
        batch_size=settings.batch_size,
        # Every image is looked at once: nothing is worth keeping.
        store=DecodedStore(limit_bytes=0),
        workers=settings.workers,
    )
    predictions = predict_batches(
        model,
        loader,
        device=settings.device,
        regression=bool(model.extra.get("regression", False)),
        target=target_of(model.extra),
        progress=True,
    )
    return items, with_cuts(predictions, cuts_of(model.extra)), classes


def _open_images(
    settings: PredictSettings, classes: tuple[str, ...], reading: Reading, several: bool
) -> tuple[ImageItem, ...]:
    return open_images(
        settings.images,
        classes,
        reading,
        several=several,
        skip_unreadable=settings.skip_unreadable,
        workers=settings.workers,
    )


def _write_csv(
    output: Path, items: Sequence[ImageItem], predictions: Predictions, classes: tuple[str, ...]
) -> None:
    with write_atomically(output) as file:
        writer = csv.writer(file)
        writer.writerow(["path", *said_columns(predictions, classes)])
        for item, cells in zip(items, said_cells(predictions, classes), strict=True):
            writer.writerow([str(item.path), *cells])
