"""What a run of a peer reads, and which settings it must refuse: images, and no features."""

import dataclasses
import logging
from pathlib import Path

from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.config import PEER_METHODS, ConfigError, check_divides
from fpt_fast.distributed import ALONE, World
from fpt_fast.images import DecodedStore
from fpt_fast.loader import NoFeatures
from fpt_fast.model_files import read_description
from fpt_fast.peers import LEARNING_RATES, PEER_FORMAT, BackboneSource, PeerConfig, PeerModel
from fpt_fast.pipeline.data import open_image_set, reading_of
from fpt_fast.pipeline.features import recorded_source
from fpt_fast.pipeline.inputs import RunInputs, require_classes
from fpt_fast.pipeline.peer_plan import PeerPlan
from fpt_fast.pipeline.planning import choose_normalization
from fpt_fast.pipeline.settled import frozen_settings
from fpt_fast.records import ImageSet, Preprocessing
from fpt_fast.run_settings import TrainSettings
from fpt_fast.setting_values import parse_size

log = logging.getLogger("fpt_fast")

# Settings of FPT and FPT+ that would do nothing here, and why.
_FPT_ONLY = {
    **dict.fromkeys(
        (
            *("layers", "token_ratio", "importance", "features", "features_on", "fusion"),
            *("augment_input", "side_size"),
        ),
        "belongs to FPT and FPT+",
    ),
    "side_cache": "the images are needed at full resolution, and decoded in every epoch",
    "attention": "chooses among implementations without a derivative",
    "dtype": "is that of a frozen pass; that of training is --precision",
    "preset": "names a learning rate published for FPT; give --learning-rate",
}
_PEER_ONLY = (
    *("rank", "lora_targets", "bottleneck", "adapter_places", "prompt_depth", "side_init"),
    "gradient_checkpointing",
)
_CONFIG_FIELDS = (*_PEER_ONLY, "num_prompts", "side_reduction", "position_interpolation")


def is_peer(settings: TrainSettings) -> bool:
    """Whether the method is one of those that FPT is compared with."""
    return settings.method in PEER_METHODS


def is_peer_folder(folder: Path) -> bool:
    """Whether ``folder`` holds a saved peer."""
    return folder.is_dir() and bool(read_description(folder)["format"] == PEER_FORMAT)


def settle_method(settings: TrainSettings) -> TrainSettings:
    """Refuse settings that the method does not read, and fill in what it takes for granted."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    given = {name for name, default in defaults.items() if getattr(settings, name) != default}
    if settings.dtype == "auto":
        given.discard("dtype")
    if not is_peer(settings):
        if extra := [name for name in _PEER_ONLY if name in given]:
            raise ConfigError(
                f"{_flags(extra)}: belongs to the methods that FPT is compared with, got "
                f"--method {settings.method}; leave it out"
            )
        if not settings.cache:
            raise ConfigError(
                f"--method {settings.method} needs --cache: the directory of a feature cache made "
                "by fpt-fast preload, or none for a frozen pass with every batch"
            )
        return settings
    for name, reason in _FPT_ONLY.items():
        if name in given:
            raise ConfigError(
                f"{_flags([name])}: {reason}; leave it out with --method {settings.method}"
            )
    if settings.cache not in ("", "none"):
        raise ConfigError(
            f"--method {settings.method} trains on images at full resolution and reads no feature "
            f"cache, got --cache {settings.cache}; leave it out"
        )
    if settings.backbone is None:
        raise ConfigError(
            f"--method {settings.method} needs --backbone, the model to start from: a timm name, "
            "or the directory of a Hugging Face ViT"
        )
    peer_config(settings)
    return dataclasses.replace(
        settings,
        cache="none",
        side_images="exact",
        input_size=settings.input_size or "512",
        learning_rate=settings.learning_rate or LEARNING_RATES[settings.method],  # type: ignore[index]
    )


def peer_config(settings: TrainSettings) -> PeerConfig:
    """The method's configuration; ``ConfigError`` for what belongs to another method."""
    values = {name: getattr(settings, name) for name in _CONFIG_FIELDS}
    given = {name: value for name, value in values.items() if value is not None}
    return PeerConfig.from_json({"method": settings.method, **given})


def open_peer_inputs(
    settings: TrainSettings, world: World = ALONE
) -> tuple[RunInputs, PeerPlan, PeerConfig, FrozenBackbone]:
    """Open the data and load the model to start from."""
    config = peer_config(settings)
    how = frozen_settings(settings)
    reading = reading_of(how)
    images = open_image_set(settings, reading=reading, world=world)
    name = str(settings.backbone)
    size = parse_size("input_size", str(settings.input_size))
    backbone = load_backbone(
        name,
        checkpoint_path=settings.checkpoint_path,
        pretrained=settings.pretrained,
        dtype="float32",
        device="cpu",
        position_interpolation=how.position_interpolation,
    )
    check_divides("input_size", size, backbone.spec.patch_size)
    config.check_against(backbone.spec)
    checkpoint = settings.checkpoint_path
    source = BackboneSource(
        recorded_source(name),
        None if checkpoint is None else str(checkpoint.resolve()),
        settings.pretrained,
    )
    mean, std = choose_normalization(how, backbone.spec, size, images, world)
    plan = PeerPlan(backbone.spec, source, Preprocessing(size, mean, std, how.fit), reading)
    log.info(
        "%s on %s, input %dx%d, %d tokens",
        *(config.method, backbone.spec.name, *size, backbone.spec.num_tokens(size)),
    )
    return _inputs(images, plan, world), plan, config, backbone


def reopen_peer(
    settings: TrainSettings,
    *,
    backbone: str | None,
    checkpoint_path: Path | None,
    world: World = ALONE,
) -> tuple[RunInputs, PeerModel]:
    """Open the data of ``settings`` for the best model of its run, and that model.

    Raises ``ModelFileError`` for a frozen model with other weights, and ``ConfigError`` for data
    with other classes.
    """
    model, plan = load_peer(
        settings.run / "best", backbone=backbone, checkpoint_path=checkpoint_path
    )
    images = open_image_set(settings, reading=plan.reading, world=world)
    require_classes(images, tuple(model.extra["classes"]))
    return _inputs(images, plan, world), model


def load_peer(
    folder: Path, *, backbone: str | None, checkpoint_path: Path | None
) -> tuple[PeerModel, PeerPlan]:
    """A saved peer, and how images are prepared for it."""
    model = PeerModel.from_pretrained(folder, backbone=backbone, checkpoint_path=checkpoint_path)
    return model, PeerPlan.of(model)


def _inputs(images: ImageSet, plan: PeerPlan, world: World) -> RunInputs:
    store = DecodedStore()
    side = plan.preprocessing
    return RunInputs(images, plan, NoFeatures(), None, side, store, None, world=world)


def _flags(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)
