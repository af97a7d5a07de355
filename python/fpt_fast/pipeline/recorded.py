"""A trained run as it is found on disk, and images to apply it to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fpt_fast.config import ConfigError
from fpt_fast.images import list_images
from fpt_fast.model import FptModel
from fpt_fast.pipeline.data import without_unreadable
from fpt_fast.pipeline.features import FeaturePlan
from fpt_fast.pipeline.grades import cuts_of, target_of
from fpt_fast.pipeline.peers import is_peer_folder
from fpt_fast.pipeline.run_folder import model_folder, read_best_model
from fpt_fast.records import UNLABELLED, ImageItem, ImageSet, Reading


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """A trained model, how its features are made, its class names, whether it grades, and whether
    an image may have several of the classes; ``cuts`` between learned grades, and the scale
    ``target`` of a number that it predicts (None: it predicts no numbers)."""

    model: FptModel
    plan: FeaturePlan
    classes: tuple[str, ...]
    regression: bool
    several: bool = False
    cuts: tuple[float, ...] | None = None
    target: tuple[float, float] | None = None


def read_recorded_run(run: Path) -> RecordedRun:
    """The best model of a run of FPT or FPT+ with what applying it needs.

    Raises ``ConfigError`` for a run of another method, or one that lacks something.
    """
    if is_peer_folder(model_folder(run)):
        raise ConfigError(
            f"{run} was trained with a method that FPT is compared with; this works for runs of "
            "fpt and fpt_plus only (predict and evaluate take any)"
        )
    model = read_best_model(run)
    try:
        return RecordedRun(
            model,
            FeaturePlan.from_json(model.extra["features"]),
            tuple(model.extra["classes"]),
            bool(model.extra.get("regression", False)),
            model.extra.get("task") == "multilabel",
            cuts_of(model.extra),
            target_of(model.extra),
        )
    except KeyError as error:
        raise ConfigError(
            f"{run} lacks {error.args[0]!r}; it was not written by fpt-fast train"
        ) from error


def open_images(
    paths: Sequence[Path],
    classes: tuple[str, ...],
    reading: Reading,
    *,
    several: bool,
    skip_unreadable: bool,
    workers: int,
) -> tuple[ImageItem, ...]:
    """Images, folders and CSV lists as unlabelled images, all of which can be decoded.

    ``several``: each may have any of ``classes``, none of which is known.
    """
    found = list_images(paths)
    unknown = (UNLABELLED,) * len(classes) if several else ()
    items = tuple(
        ImageItem(path.as_posix(), path, UNLABELLED, "test", reading, findings=unknown)
        for path in found
    )
    images = ImageSet(root=Path(), classes=classes, items=items)
    return without_unreadable(images, skip=skip_unreadable, workers=workers).items
