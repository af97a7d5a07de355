"""The data set of a command: loaded, every image known to be readable."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fpt_fast.config import ConfigError
from fpt_fast.distributed import ALONE, World
from fpt_fast.images import (
    ImageError,
    check_images,
    format_unreadable,
    has_dicom_name,
    load_image_set,
    parse_window,
)
from fpt_fast.records import AS_THE_FILE_SAYS, SPLITS, ImageItem, ImageSet, Reading
from fpt_fast.settings import DataSettings, ListingSettings, ReadingSettings
from fpt_fast.words import counted

log = logging.getLogger("fpt_fast")


class UnreadableImages(ValueError):
    """Images that cannot be decoded, named together."""


def open_image_set(
    settings: DataSettings,
    *,
    reading: Reading = AS_THE_FILE_SAYS,
    check: bool = True,
    world: World = ALONE,
) -> ImageSet:
    """Load the data set of ``settings``; with ``check``, decode every image once, by ``reading``.

    Unreadable images are reported together, before any work; with ``skip_unreadable`` they are
    left out instead.  The ranks of ``world`` share the decoding.
    """
    images = list_image_set(settings, settings.data)
    images = read_as(images, reading)
    if check:  # else whoever made the features has said it
        _say_what_is_cut(images, reading)
        images = without_unreadable(
            images, skip=settings.skip_unreadable, workers=settings.workers, world=world
        )
    require_training_images(images)
    kind = {"multilabel": "findings", "multiclass": "classes"}.get(images.task)
    log.info(
        "data: %s of %s (%s)",
        counted(len(images.items), "image"),
        f"numbers, {images.classes[0]}" if kind is None else f"{len(images.classes)} {kind}",
        ", ".join(f"{split} {len(images.of_split(split))}" for split in SPLITS),
    )
    return images


def list_image_set(how: ListingSettings, data: Path) -> ImageSet:
    """List ``data`` the way that ``how`` says; nothing is decoded."""
    return load_image_set(
        data,
        ratios=how.split_ratios,
        seed=how.split_seed,
        path_column=how.path_column,
        label_column=how.label_column,
        split_column=how.split_column,
        patient_column=how.patient_column,
        patient_pattern=how.patient_pattern,
        label_columns=how.label_columns,
        value_column=how.value_column,
        blank_findings=how.blank_findings,
        fold=how.fold,
        class_order=how.class_order,
    )


def patient_notes(settings: ListingSettings) -> dict[str, Any]:
    """How patients were told apart, for a cache's notes; empty where they were not."""
    named = {"patient_column": settings.patient_column, "patient_pattern": settings.patient_pattern}
    return {name: value for name, value in named.items() if value is not None}


def require_patients(settings: ListingSettings, notes: Mapping[str, Any]) -> None:
    """Raise ``ConfigError`` where a cache was made knowing patients, and they are now unknown: a
    split by image would tear them apart, and its figures would be too good."""
    known = {name: notes[name] for name in ("patient_column", "patient_pattern") if name in notes}
    if known and not patient_notes(settings):
        flags = " ".join(f"--{name.replace('_', '-')} {value!r}" for name, value in known.items())
        raise ConfigError(
            f"the cache was made with {flags}, so that no patient stands on two sides of a split; "
            "without it the data would be split image by image: give it here too"
        )


def patients_of(items: Sequence[ImageItem]) -> list[str] | None:
    """The patient of each image, as ``trust`` resamples them; None where they are not known."""
    names = [item.patient for item in items if item.patient is not None]
    return names if len(names) == len(items) > 0 else None


def _say_what_is_cut(images: ImageSet, reading: Reading) -> None:
    if parse_window(reading.window) is not None:
        log.info("window %s: levels outside it become black or white", reading.window)
    elif reading.window == "file":
        count = sum(has_dicom_name(item.path) for item in images.items)
        if count:
            log.info(
                "%d DICOM images, each through its own window where it has one: levels outside "
                "become black or white; --window full keeps them all",
                count,
            )


def read_as(images: ImageSet, reading: Reading) -> ImageSet:
    """``images`` with every file to be read by ``reading``."""
    if reading == AS_THE_FILE_SAYS:
        return images
    items = tuple(dataclasses.replace(item, reading=reading) for item in images.items)
    return dataclasses.replace(images, items=items)


def reading_of(settings: ReadingSettings) -> Reading:
    """How ``settings`` want image files to be read; ``ConfigError`` for what makes no sense."""
    parse_window(settings.window)
    if settings.dicom_frame is not None and settings.dicom_frame < 1:
        raise ConfigError(f"dicom_frame counts from 1, got {settings.dicom_frame}")
    return Reading(settings.window, settings.dicom_frame)


def require_training_images(images: ImageSet) -> None:
    """Raise where a class has no training image (left), naming the classes."""
    train = images.of_split("train")
    if images.task == "regression":
        if not train:
            raise UnreadableImages("no readable training image is left; mend the images")
        return
    trained = {item.label for item in train}
    trained |= {f for item in train for f, has in enumerate(item.findings) if has == 1}
    empty = [name for label, name in enumerate(images.classes) if label not in trained]
    if empty:
        raise UnreadableImages(
            f"no readable training image is left of {', '.join(empty)}; mend the images, or leave "
            f"these {'findings' if images.task == 'multilabel' else 'classes'} out of the data"
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
