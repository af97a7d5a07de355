"""``fpt-fast doctor``: a data folder, a cache and a run, each and together."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fpt_fast.cache import CacheError, CacheReader, inspect_cache, verify_cache
from fpt_fast.config import ConfigError
from fpt_fast.doctor import (
    Diagnosis,
    Finding,
    ImageFacts,
    examine_images,
    find_in_images,
    find_in_padding,
    find_in_run,
)
from fpt_fast.images import ImageError, ImageSetError, digest_images
from fpt_fast.pipeline.data import list_image_set, read_as, reading_of
from fpt_fast.pipeline.evaluation import read_run_settings
from fpt_fast.pipeline.features import FeaturePlan
from fpt_fast.pipeline.run_folder import BEST
from fpt_fast.pipeline.settled import frozen_settings
from fpt_fast.records import AS_THE_FILE_SAYS, Fit, ImageSet, Reading
from fpt_fast.run_settings import TrainSettings
from fpt_fast.setting_values import build_settings, parse_size
from fpt_fast.settings import DoctorSettings
from fpt_fast.words import counted, counted_are

Size = tuple[int, int]

# Images whose kept tokens are looked at: enough for a share of them to a percent or two.
_LOOKED_AT = 500


def doctor(settings: DoctorSettings | None = None, **values: Any) -> Diagnosis:
    """Look for what is wrong with data, cache and run; see ``DoctorSettings`` for the arguments.

    A run brings its own data and cache, unless others are named.  Nothing is changed.
    """
    settings = settings or build_settings(DoctorSettings, values)
    looked_at: list[str] = []
    found: list[Finding] = []
    data, cache = settings.data, settings.cache
    trained: TrainSettings | None = None
    if settings.run is not None:
        trained = read_run_settings(settings.run)
        data = trained.data if data is None else data
        cache = Path(trained.cache) if cache is None and trained.cache != "none" else cache
        looked_at.append(f"run:   {settings.run}")
        found += find_in_run(settings.run, balanced=trained.loss_weight != "none")
        if not (settings.run / BEST).is_dir():
            found.append(Finding("error", f"{settings.run} holds no {BEST}/ model", "train again"))
    if data is None and cache is None:
        raise ConfigError("nothing to look at: give --data, --cache or --run")
    images: ImageSet | None = None
    if data is not None:
        looked_at.append(f"data:  {data}")
        try:
            images = _image_set(settings, trained, data)
        except ImageSetError as error:
            found.append(Finding("error", str(error)))
    made: FeaturePlan | None = None
    if cache is not None:
        looked_at.append(f"cache: {cache}")
        found += _find_in_cache(cache, images, settings.workers)
        made = _plan_of(cache)
        found += _find_other_input(settings, trained, made)
    size, fit, reading = _input(settings, trained, made)
    if images is not None:
        images = read_as(images, reading)
        facts, errors = examine_images(images.items, workers=settings.workers)
        found += find_in_images(facts, errors, images.classes, size, fit)
        if size is not None and fit == "pad" and facts:
            found += _find_padding(facts, size, cache, made)
    elif fit == "pad" and data is None:
        found.append(
            Finding(
                "note",
                "images were padded for this cache (--fit pad)",
                "with --data, too, this says what share of the kept tokens lies in the padding",
            )
        )
    return Diagnosis(tuple(looked_at), tuple(found))


def _input(
    settings: DoctorSettings, trained: TrainSettings | None, made: FeaturePlan | None
) -> tuple[Size | None, Fit, Reading]:
    """How images become the frozen model's input: as a cache has it, as is said, or a run."""
    if made is not None:
        return made.preprocessing.size, made.preprocessing.fit, made.reading
    text = settings.input_size or (None if trained is None else trained.input_size)
    size = None if text is None else parse_size("input_size", text)
    if trained is not None:
        frozen = frozen_settings(trained)
        return size, settings.fit or frozen.fit, reading_of(frozen)
    return size, settings.fit or "stretch", AS_THE_FILE_SAYS


def _find_other_input(
    settings: DoctorSettings, trained: TrainSettings | None, made: FeaturePlan | None
) -> list[Finding]:
    """Where a cache has another input than is asked for, here or by the run."""
    if made is None:
        return []
    text, fit, have = settings.input_size, settings.fit, made.preprocessing
    if trained is not None:
        text, fit = text or trained.input_size, fit or trained.fit
    differing = []
    if text is not None and parse_size("input_size", text) != have.size:
        differing.append(f"input_size: the cache has {_shown(have.size)}, {text} is asked for")
    if fit is not None and fit != have.fit:
        differing.append(f"fit: the cache has {have.fit}, {fit} is asked for")
    if not differing:
        return []
    return [
        Finding(
            "error",
            "the cache was made with another input than is asked for: train and preload refuse "
            "the two together",
            "name the cache that fits, preload into another --cache directory, or ask for what the "
            "cache has; what else is said here is of the cache's own input. Without --cache this "
            "says what another input would be like",
            tuple(differing),
        )
    ]


def _shown(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _image_set(settings: DoctorSettings, trained: TrainSettings | None, data: Path) -> ImageSet:
    return list_image_set(settings if trained is None else trained, data)


def _find_in_cache(cache: Path, images: ImageSet | None, workers: int) -> list[Finding]:
    """Damage, and images of the data that the cache lacks or has with other pixels."""
    try:
        report = verify_cache(cache, workers=workers)
    except (CacheError, OSError) as error:
        return [Finding("error", str(error))]
    found = []
    if not report.ok:
        found.append(
            Finding(
                "error",
                f"of the cache {counted_are(len(report.bad_keys), 'record')} not what was written"
                + "".join(f"; {problem}" for problem in report.problems),
                "fpt-fast cache repair --cache ... --data ... --backbone ...",
                report.bad_keys,
            )
        )
    if report.state != "finished":
        found.append(
            Finding(
                "error",
                f"the cache is unfinished: {report.done} of {report.records} records are written",
                "run the same fpt-fast preload again: it goes on where it stopped",
            )
        )
    elif images is not None and report.ok:
        found += _compare(cache, images, workers)
    return found


def _compare(cache: Path, images: ImageSet, workers: int) -> list[Finding]:
    try:
        digests = digest_images(images.items, workers=workers)
        with CacheReader(cache) as reader:
            known = set(reader.keys)
            shared = {key: value for key, value in digests.items() if key in known}
            lacking = tuple(key for key in digests if key not in known)
            reader.require_images(shared)
    except ImageError as error:
        return [Finding("error", str(error))]
    except CacheError as error:
        return [Finding("error", str(error))]
    if not lacking:
        return []
    return [
        Finding(
            "error",
            f"the cache lacks {len(lacking)} of {counted(len(digests), 'image')} of the data",
            "run fpt-fast preload again with the same settings: it adds what is missing; images "
            "that cannot be read are left out by --skip-unreadable, of preload and of train",
            lacking,
        )
    ]


def _plan_of(cache: Path) -> FeaturePlan | None:
    """How a cache was made; None where it cannot be read, which others say."""
    try:
        return FeaturePlan.from_json(inspect_cache(cache).fingerprint)
    except (CacheError, ConfigError, OSError):
        return None


def _find_padding(
    facts: Sequence[ImageFacts], size: Size, cache: Path | None, made: FeaturePlan | None
) -> list[Finding]:
    """What padding takes of the input, and of what a cache keeps, where there is one so made."""
    if cache is None or made is None:
        return list(find_in_padding([fact.size for fact in facts], size))
    facts, kept = _kept_of(cache, facts)
    return list(
        find_in_padding(
            [fact.size for fact in facts],
            size,
            made.spec.patch_size,
            kept=kept,
            prefix_tokens=made.spec.prefix_tokens,
            layers=made.layers,
        )
    )


def _kept_of(
    cache: Path, facts: Sequence[ImageFacts]
) -> tuple[Sequence[ImageFacts], Tensor | None]:
    """Some of the images, evenly, and the index of the tokens that the cache keeps of each; all of
    them and None where it cannot be read, or has none of them."""
    try:
        with CacheReader(cache) as reader:
            known = set(reader.keys)
            there = [fact for fact in facts if fact.item.key in known]
            some = there[:: max(1, -(-len(there) // _LOOKED_AT))]
            rows = [reader.row(fact.item.key) for fact in some]
            return (some, _kept(reader, rows)) if some else (facts, None)
    except (CacheError, OSError):
        return facts, None


def _kept(reader: CacheReader, rows: Sequence[int]) -> Tensor:
    """The index of the tokens that records keep: [rows, L, H, K] i32, on the CPU."""
    view = reader.view(rows)
    if view is not None:
        return view.index[list(rows)]
    # A record at a time: their keys and values are large, and not needed.
    return torch.cat([reader.read([row]).index.clone() for row in rows])
