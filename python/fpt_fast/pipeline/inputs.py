"""What a run reads: its data, its features from a cache or a frozen pass, and its loaders."""

import dataclasses
import logging
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpt_fast.cache import CacheMismatch, CacheReader
from fpt_fast.config import (
    AugmentConfig,
    ConfigError,
    FptConfig,
    format_layers,
    parse_layers,
    preset,
)
from fpt_fast.distributed import ALONE, World
from fpt_fast.images import (
    DecodedStore,
    digest_images,
    shrink_images,
)
from fpt_fast.loader import (
    FeatureLoader,
    FeatureSource,
    FrozenPass,
    LiveFeatures,
    NoFeatures,
)
from fpt_fast.model import FptModel
from fpt_fast.pipeline.data import (
    open_image_set,
    read_as,
    reading_of,
    require_patients,
    require_training_images,
)
from fpt_fast.pipeline.features import FeaturePlan, load_recorded_backbone
from fpt_fast.pipeline.peer_plan import PeerPlan
from fpt_fast.pipeline.placing import PlacedFeatures, has_room_for
from fpt_fast.pipeline.planning import make_plan
from fpt_fast.pipeline.settled import frozen_settings, require_settled
from fpt_fast.records import ImageSet, Preprocessing, Split
from fpt_fast.run_settings import TrainSettings
from fpt_fast.setting_values import parse_size
from fpt_fast.settings import FrozenSettings
from fpt_fast.trainer import resolve_device
from fpt_fast.words import counted

log = logging.getLogger("fpt_fast")


@dataclass(frozen=True, slots=True)
class RunInputs:
    """Everything that a run reads, opened: data, features, and how to make the model's input.

    ``plain_features`` are those of a live pass without augmentation, for evaluation; ``placed``
    those of a cache, split by split.  ``world`` reads them together.
    """

    images: ImageSet
    plan: FeaturePlan | PeerPlan
    features: FeatureSource
    plain_features: LiveFeatures | None
    side: Preprocessing
    store: DecodedStore
    reader: CacheReader | None
    placed: PlacedFeatures | None = None
    world: World = ALONE


def open_inputs(
    settings: TrainSettings, stack: ExitStack, world: World = ALONE
) -> tuple[RunInputs, FptConfig]:
    """Open data and features for training, and settle the method; all ranks of ``world`` do."""
    live = settings.cache == "none"
    # With a cache every image was readable when it was made; a live pass has nobody to vouch.
    if live:
        frozen = frozen_settings(settings)
        images = open_image_set(settings, reading=reading_of(frozen), world=world)
        return _open_live(settings, frozen, images, world)
    images = open_image_set(settings, check=False)
    reader = stack.enter_context(CacheReader(Path(settings.cache)))
    require_patients(settings, reader.notes)
    plan = FeaturePlan.from_json({**reader.fingerprint, **reader.notes})
    require_settled(settings, plan)
    method = _method(settings, plan)
    _require_layers(plan, method)
    _say_if_large(method, plan)
    repeated: tuple[Split, ...] = ("train", "val")
    return _from_cache(
        settings, read_as(images, plan.reading), plan, reader, method, repeated, world
    ), method


def reopen_inputs(
    settings: TrainSettings,
    stack: ExitStack,
    model: FptModel,
    *,
    backbone: str | None = None,
    checkpoint_path: Path | None = None,
    world: World = ALONE,
) -> RunInputs:
    """Open data and features for a trained model: they must be such as it was trained on.

    Raises ``CacheMismatch`` for a cache of other features, changed images or a frozen model with
    other weights, and ``ConfigError`` for data with other classes.
    """
    live = settings.cache == "none"
    plan = FeaturePlan.from_json(model.extra["features"])
    images = open_image_set(settings, reading=plan.reading, check=live, world=world)
    require_classes(images, tuple(model.extra["classes"]))
    if not live:
        reader = stack.enter_context(CacheReader(Path(settings.cache)))
        plan.require_equal(FeaturePlan.from_json(reader.fingerprint), str(settings.cache))
        return _from_cache(settings, images, plan, reader, model.config, (), world)
    frozen = plan.frozen_pass(
        load_recorded_backbone(
            plan,
            backbone=backbone,
            checkpoint_path=checkpoint_path,
            dtype="auto",
            device=settings.device,
            attention=settings.attention,
        )
    )
    return _live_inputs(images, plan, frozen, model.config, None, world)


def _from_cache(
    settings: TrainSettings,
    images: ImageSet,
    plan: FeaturePlan,
    reader: CacheReader,
    method: FptConfig,
    repeated: Collection[Split],
    world: World,
) -> RunInputs:
    if settings.skip_unreadable:
        images = _only_cached(images, reader)
    placed = None
    if method.fusion:
        device = resolve_device(settings.device)
        size = method.side_size
        placed = PlacedFeatures(settings, reader, images, device, side_size=size, repeated=repeated)
        reader.require_images(digest_images(images.items, workers=settings.workers, world=world))
    side = dataclasses.replace(plan.preprocessing, size=method.side_size)
    return RunInputs(images, plan, NoFeatures(), None, side, DecodedStore(), reader, placed, world)


def _live_inputs(
    images: ImageSet,
    plan: FeaturePlan,
    frozen: FrozenPass,
    method: FptConfig,
    augment: AugmentConfig | None,
    world: World,
) -> RunInputs:
    side = dataclasses.replace(plan.preprocessing, size=method.side_size)
    plain = LiveFeatures(frozen) if method.fusion else None
    training: FeatureSource = NoFeatures()
    if plain is not None:
        training = plain if augment is None else LiveFeatures(frozen, augment)
    return RunInputs(images, plan, training, plain, side, DecodedStore(), None, None, world)


def require_classes(images: ImageSet, trained: tuple[str, ...]) -> None:
    """Raise ``ConfigError`` unless the data has the classes that a model was trained on."""
    if images.classes != trained:
        raise ConfigError(
            f"the data has the classes {', '.join(images.classes)}, but the run was trained on "
            f"{', '.join(trained)}; evaluate on data with the same classes"
        )


def _require_layers(plan: FeaturePlan, method: FptConfig) -> None:
    """A cache made for the other method has other layers: never train on it unasked."""
    wanted = method.resolve_layers(plan.spec.depth)
    if plan.layers != wanted:
        raise CacheMismatch(
            f"the feature cache holds layers {format_layers(plan.layers)}, but {method.method} "
            f"learns from layers {format_layers(wanted)} of {plan.spec.name}; preload for this "
            f"method, or say --layers {format_layers(plan.layers)} to learn from these"
        )


def _say_if_large(method: FptConfig, plan: FeaturePlan) -> None:
    """Warn where the side network, which is to see the image small, sees more than the other."""
    side, frozen = method.side_size, plan.preprocessing.size
    if method.fusion and (side[0] > frozen[0] or side[1] > frozen[1]):
        log.warning(
            "the side network's input of %dx%d is larger than the frozen model's of %dx%d: it is "
            "meant to see the image small; choose a smaller --side-size",
            *(*side, *frozen),
        )


def _open_live(
    settings: TrainSettings, frozen: FrozenSettings, images: ImageSet, world: World
) -> tuple[RunInputs, FptConfig]:
    if settings.backbone is None:
        raise ConfigError(
            "--cache none needs --backbone, the frozen model to run on every batch; or name a "
            "cache made by fpt-fast preload"
        )
    method = _method(settings, None)
    plan, backbone = make_plan(
        frozen,
        settings.backbone,
        settings.input_size or "512",
        method,
        images,
        features=settings.features or "float16",
        world=world,
    )
    _say_if_large(method, plan)
    augment = AugmentConfig() if settings.augment_input else None
    return _live_inputs(images, plan, plan.frozen_pass(backbone), method, augment, world), method


def _method(settings: TrainSettings, plan: FeaturePlan | None) -> FptConfig:
    """The method's configuration; what a cache has settled is taken from it."""
    changes: dict[str, Any] = {"fusion": settings.fusion}
    if plan is not None:
        changes |= {"token_ratio": plan.token_ratio, "importance": plan.importance}
        if settings.layers is not None:
            changes["layers"] = plan.layers
    else:
        if settings.layers is not None:
            changes["layers"] = parse_layers(settings.layers)
        if settings.token_ratio is not None:
            changes["token_ratio"] = settings.token_ratio
        if settings.importance is not None:
            changes["importance"] = settings.importance
    if settings.num_prompts is not None:
        changes["num_prompts"] = settings.num_prompts
    if settings.side_reduction is not None:
        changes["side_reduction"] = settings.side_reduction
    if settings.side_size is not None:
        changes["side_size"] = parse_size("side_size", settings.side_size)
    return preset(settings.method, **changes)


def make_loader(
    inputs: RunInputs,
    settings: TrainSettings,
    split: Split,
    *,
    repeated: bool = False,
    side_device: torch.device | None = None,
) -> FeatureLoader:
    """The loader of one split; only that of training shuffles and augments.

    ``repeated``: it will be gone through in every epoch, so that its side images may be stored.
    ``side_device``: where they are augmented within the step, if there is room for them.
    """
    training = split == "train"
    augmentation = AugmentConfig() if training and settings.augment else None
    features = inputs.features
    if not training and inputs.plain_features is not None:
        features = inputs.plain_features
    if inputs.placed is not None:
        features = inputs.placed.source(split)
    items = inputs.images.of_split(split)
    side_images = None
    if repeated and items and settings.side_images == "stored":
        side_images = shrink_images(
            items,
            inputs.side,
            augmented=augmentation is not None,
            workers=settings.workers,
            directory=settings.side_cache,
            world=inputs.world,
        )
    if side_images is None or not has_room_for(side_images, inputs.placed, side_device):
        side_device = None
    return FeatureLoader(
        items,
        features,
        inputs.side,
        batch_size=settings.batch_size,
        store=inputs.store,
        augmentation=augmentation,
        side_images=side_images,
        shuffle=training,
        seed=settings.seed,
        order_seed=settings.order_seed,
        sampling=settings.sampling if training else "shuffled",
        workers=settings.workers,
        staging=None if inputs.placed is None else inputs.placed.staging,
        side_device=side_device,
    )


def _only_cached(images: ImageSet, reader: CacheReader) -> ImageSet:
    """With ``--skip-unreadable``, the images that preloading skipped are skipped here too."""
    known = set(reader.keys)
    missing = [item.key for item in images.items if item.key not in known]
    if missing:
        log.warning("going on without %s that the cache lacks", counted(len(missing), "image"))
    images = dataclasses.replace(
        images, items=tuple(item for item in images.items if item.key in known)
    )
    require_training_images(images)
    return images
