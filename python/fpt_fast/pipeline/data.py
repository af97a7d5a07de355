"""The data set of a command: loaded, every image known to be readable."""

import dataclasses
import json
import logging
from collections.abc import Sequence

from fpt_fast.distributed import ALONE, World
from fpt_fast.images import ImageError, check_images, format_unreadable, load_image_set
from fpt_fast.records import SPLITS, ImageItem, ImageSet
from fpt_fast.settings import DataSettings

log = logging.getLogger("fpt_fast")


class UnreadableImages(ValueError):
    """Images that cannot be decoded, named together."""


def open_image_set(settings: DataSettings, *, check: bool = True, world: World = ALONE) -> ImageSet:
    """Load the data set of ``settings``; with ``check``, decode every image once.

    Unreadable images are reported together, before any work; with ``skip_unreadable`` they are
    left out instead.  The ranks of ``world`` share the decoding.
    """
    images = load_image_set(
        settings.data,
        ratios=settings.split_ratios,
        seed=settings.split_seed,
        path_column=settings.path_column,
        label_column=settings.label_column,
        split_column=settings.split_column,
    )
    if check:
        images = without_unreadable(
            images, skip=settings.skip_unreadable, workers=settings.workers, world=world
        )
    require_training_images(images)
    log.info(
        "data: %d images of %d classes (%s)",
        len(images.items),
        len(images.classes),
        ", ".join(f"{split} {len(images.of_split(split))}" for split in SPLITS),
    )
    return images


def require_training_images(images: ImageSet) -> None:
    """Raise where a class has no training image (left), naming the classes."""
    trained = {item.label for item in images.of_split("train")}
    empty = [name for label, name in enumerate(images.classes) if label not in trained]
    if empty:
        raise UnreadableImages(
            f"no readable training image is left of {', '.join(empty)}; mend the images, or leave "
            "these classes out of the data"
        )


def without_unreadable(
    images: ImageSet, *, skip: bool, workers: int, world: World = ALONE
) -> ImageSet:
    """``images`` without those that cannot be decoded; an error names them unless ``skip``."""
    keys = "\n".join(item.key for item in images.items)
    world.require_same(f"{images.classes} {keys}", "images")
    unreadable = _check_together(images.items, workers, world)
    if not unreadable:
        return images
    message = format_unreadable(unreadable)
    if not skip:
        raise UnreadableImages(
            f"{message}\nmend or remove them, or go on without them with --skip-unreadable"
        )
    log.warning("%s\ngoing on without them", message)
    bad = {error.path for error in unreadable}
    return dataclasses.replace(
        images, items=tuple(item for item in images.items if item.path not in bad)
    )


def _check_together(items: Sequence[ImageItem], workers: int, world: World) -> list[ImageError]:
    """``check_images``, each rank its share."""
    mine = world.share(len(items))
    found = check_images(items[mine.start : mine.stop], workers=workers)
    if world.size == 1:
        return found
    told = json.dumps([(error.key, error.reason) for error in found])
    path_of = {item.key: item.path for item in items}
    return sorted(
        (
            ImageError(path_of[key], reason, key)
            for part in world.gather_text(told, "looking at the images")
            for key, reason in json.loads(part)
        ),
        key=lambda error: error.key,
    )
