"""``fpt-fast doctor``: a data folder, a cache and a run, each and together."""

from pathlib import Path
from typing import Any

from fpt_fast.cache import CacheError, CacheReader, verify_cache
from fpt_fast.config import ConfigError
from fpt_fast.doctor import Diagnosis, Finding, examine_images, find_in_images, find_in_run
from fpt_fast.images import ImageError, ImageSetError, digest_images
from fpt_fast.pipeline.data import list_image_set
from fpt_fast.pipeline.evaluation import read_run_settings
from fpt_fast.pipeline.features import FeaturePlan
from fpt_fast.pipeline.run_folder import BEST
from fpt_fast.records import ImageSet
from fpt_fast.run_settings import TrainSettings
from fpt_fast.setting_values import build_settings, parse_size
from fpt_fast.settings import DoctorSettings
from fpt_fast.words import counted


def doctor(settings: DoctorSettings | None = None, **values: Any) -> Diagnosis:
    """Look for what is wrong with data, cache and run; see ``DoctorSettings`` for the arguments.

    A run brings its own data and cache, unless others are named.  Nothing is changed.
    """
    settings = settings or build_settings(DoctorSettings, values)
    looked_at: list[str] = []
    found: list[Finding] = []
    data, cache, size = settings.data, settings.cache, settings.input_size
    trained: TrainSettings | None = None
    if settings.run is not None:
        trained = read_run_settings(settings.run)
        data = trained.data if data is None else data
        cache = Path(trained.cache) if cache is None and trained.cache != "none" else cache
        looked_at.append(f"run:   {settings.run}")
        found += find_in_run(settings.run)
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
    if cache is not None:
        looked_at.append(f"cache: {cache}")
        found += _find_in_cache(cache, images, settings.workers)
        size = _size_of(cache) if size is None else size
    if images is not None:
        facts, errors = examine_images(images.items, workers=settings.workers)
        wanted = None if size is None else parse_size("input_size", size)
        found += find_in_images(facts, errors, images.classes, wanted)
    return Diagnosis(tuple(looked_at), tuple(found))


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
                f"{len(report.bad_keys)} records of the cache are not what was written"
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


def _size_of(cache: Path) -> str | None:
    try:
        with CacheReader(cache) as reader:
            height, width = FeaturePlan.from_json(reader.fingerprint).preprocessing.size
    except (CacheError, ConfigError, OSError):
        return None
    return f"{height}x{width}"
