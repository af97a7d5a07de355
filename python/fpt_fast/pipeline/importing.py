"""Importing features that the authors' code preloaded into a cache of ours."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from fpt_fast.cache import CacheWriter
from fpt_fast.cache_settings import ImportSettings
from fpt_fast.compat.features import REFERENCE_DIFFERENCES, read_reference_features
from fpt_fast.config import preset
from fpt_fast.distributed import refuse_several
from fpt_fast.pipeline.data import open_image_set
from fpt_fast.pipeline.features import parse_optional_layers
from fpt_fast.pipeline.planning import make_plan
from fpt_fast.setting_values import build_settings
from fpt_fast.settings import PreloadSettings


@dataclass(frozen=True, slots=True)
class ImportResult:
    """How many images were imported, and what differs from features of our own."""

    images: int
    differences: tuple[str, ...]


def import_reference(settings: ImportSettings | None = None, **values: Any) -> ImportResult:
    """Write the authors' preloaded features into a cache; see ``ImportSettings``.

    Their files do not say what made them: the settings given here are believed, recorded in the
    cache, and only the shapes are checked against them.
    """
    refuse_several("importing features")
    settings = settings or build_settings(ImportSettings, values)
    images = open_image_set(settings, check=False)
    method = preset(
        settings.method,
        layers=parse_optional_layers(settings.layers),
        token_ratio=settings.token_ratio,
        importance=settings.importance,
    )
    frozen = build_settings(
        PreloadSettings,
        {
            "data": settings.data,
            "cache": settings.cache,
            "backbone": settings.backbone,
            "checkpoint_path": settings.checkpoint_path,
            "pretrained": settings.pretrained,
            "normalization": settings.normalization,
            "mean": settings.mean,
            "std": settings.std,
            # Theirs is an f32 pass with their own interpolation of positions.
            "position_interpolation": "bicubic_scale",
            "dtype": "float32",
            "device": "cpu",
        },
    )
    plan, _ = make_plan(
        frozen,
        settings.backbone,
        settings.input_size,
        method,
        images,
        features=settings.dtype,
    )
    plan = dataclasses.replace(plan, attention=None)  # theirs, not what would run here
    # In the identity: features of ours must never be mixed with them.
    fingerprint = plan.fingerprint() | {"imported_from": "YijinHuang/FPT preload.py"}
    keys = [item.key for item in images.items]
    with CacheWriter(
        settings.cache,
        plan.layout,
        fingerprint,
        keys,
        notes=plan.sources(),
        quantise=plan.quantise,
    ) as writer:
        for position, tokens in read_reference_features(settings.features, images, plan.layout):
            if not writer.is_done(position):
                writer.write([position], tokens)
        writer.finish()
    return ImportResult(len(keys), REFERENCE_DIFFERENCES)
