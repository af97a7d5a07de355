"""Repair: only the bad records of a cache are made anew."""

import dataclasses
import logging
from typing import Any

from fpt_fast.cache import CacheReport, drop_bad_records, inspect_cache, verify_cache
from fpt_fast.cache_settings import RepairSettings
from fpt_fast.config import format_layers
from fpt_fast.distributed import refuse_several
from fpt_fast.pipeline.features import FeaturePlan, load_recorded_backbone
from fpt_fast.pipeline.preloading import preload, recorded_plan
from fpt_fast.setting_values import build_settings

log = logging.getLogger("fpt_fast")


def repair(settings: RepairSettings | None = None, **values: Any) -> tuple[list[str], CacheReport]:
    """Rebuild only the bad records of a cache; see ``RepairSettings`` for the arguments.

    How the records were made is read from the cache.  Returns the keys that were rebuilt, and the
    report of a full verification afterwards.
    """
    settings = settings or build_settings(RepairSettings, values)
    refuse_several("repairing a cache")
    before = recorded_plan(settings.cache)
    if before is not None:
        # Before anything is dropped: the right frozen model must be at hand to rebuild it.
        before.frozen_pass(
            load_recorded_backbone(
                before,
                backbone=settings.backbone,
                checkpoint_path=settings.checkpoint_path,
                dtype="auto",
                device=settings.device,
                attention=settings.attention,
            )
        )
    # This also puts a damaged manifest right, which could not be inspected.
    bad = drop_bad_records(settings.cache)
    remaining = inspect_cache(settings.cache)
    plan = FeaturePlan.from_json(remaining.fingerprint)
    if bad:
        log.info("rebuilding %d bad records: %s", len(bad), ", ".join(bad[:10]))
    if remaining.state != "finished":
        shared = {
            field.name: getattr(settings, field.name)
            for field in dataclasses.fields(RepairSettings)
        }
        preload(
            **shared,
            layers=format_layers(plan.layers),
            token_ratio=plan.token_ratio,
            importance=plan.importance,
            input_size="x".join(map(str, plan.preprocessing.size)),
            mean=plan.preprocessing.mean,
            std=plan.preprocessing.std,
            position_interpolation=plan.position_interpolation,
            dtype=plan.dtype,
            features=plan.features,
            fit=plan.preprocessing.fit,
            window=plan.reading.window,
            dicom_frame=plan.reading.frame,
        )
    return bad, verify_cache(settings.cache)
