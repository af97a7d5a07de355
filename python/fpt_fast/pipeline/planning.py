"""From the settings of a command to the plan of its features, and the frozen model for it."""

import logging

from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.cache import CacheMismatch
from fpt_fast.config import ConfigError, FptConfig, check_divides, format_layers
from fpt_fast.distributed import ALONE, World
from fpt_fast.images import dataset_preset, measure_statistics
from fpt_fast.pipeline.data import reading_of
from fpt_fast.pipeline.features import FeaturePlan, recorded_source
from fpt_fast.records import BackboneSpec, FeatureDtype, ImageSet, Preprocessing
from fpt_fast.setting_values import parse_size
from fpt_fast.settings import FrozenSettings

log = logging.getLogger("fpt_fast")

Channels = tuple[float, float, float]


def make_plan(
    settings: FrozenSettings,
    source: str,
    input_size: str,
    method: FptConfig,
    images: ImageSet,
    recorded: FeaturePlan | None = None,
    features: FeatureDtype = "float16",
    world: World = ALONE,
) -> tuple[FeaturePlan, FrozenBackbone]:
    """Load the frozen model and settle everything that shapes the features.

    ``normalization="auto"`` measures the training images at the input size, last of all; where
    features were ``recorded`` at that size, their mean and deviation stay, so that a data set can
    grow.  Raises ``CacheMismatch`` where something else was recorded than is asked for.
    """
    size = parse_size("input_size", input_size)
    backbone = load_backbone(
        source,
        checkpoint_path=settings.checkpoint_path,
        pretrained=settings.pretrained,
        dtype=settings.dtype,
        device=settings.device,
        position_interpolation=settings.position_interpolation,
        attention=settings.attention,
    )
    spec = backbone.spec
    check_divides("input_size", size, spec.patch_size)
    method.check_against(spec)
    reading = reading_of(settings)

    def planned(mean: Channels, std: Channels) -> FeaturePlan:
        return FeaturePlan(
            spec=spec,
            source=recorded_source(source),
            checkpoint_path=(
                None
                if settings.checkpoint_path is None
                else str(settings.checkpoint_path.resolve())
            ),
            pretrained=settings.pretrained,
            position_interpolation=settings.position_interpolation,
            dtype=str(backbone.dtype).removeprefix("torch."),
            preprocessing=Preprocessing(size, mean, std, settings.fit),
            layers=method.resolve_layers(spec.depth),
            token_ratio=method.token_ratio,
            importance=method.importance,
            features=features,
            attention=backbone.attention_implementation,
            reading=reading,
        )

    if recorded is not None:
        # Before the images are measured, which takes minutes: whatever they give would not fit.
        _refuse_another(recorded, planned(recorded.preprocessing.mean, recorded.preprocessing.std))
    measured = settings.normalization == "auto" and settings.mean is None and settings.std is None
    if measured and recorded is not None and _measures_alike(recorded, settings, size):
        mean, std = recorded.preprocessing.mean, recorded.preprocessing.std
        log.info("normalisation: as the cache has it (measured when it was begun)")
    else:
        mean, std = choose_normalization(settings, spec, size, images, world)
    plan = planned(mean, std)
    log.info(
        "features: %s, layers %s of %d, %d of %d tokens per head, kept as %s, input %dx%d, "
        "%s on %s, attention %s",
        spec.name,
        format_layers(plan.layers),
        spec.depth,
        plan.layout.kept,
        spec.num_tokens(size),
        plan.features,
        *size,
        plan.dtype,
        backbone.device,
        plan.attention,
    )
    return plan, backbone


def _refuse_another(recorded: FeaturePlan, asked: FeaturePlan) -> None:
    """Raise ``CacheMismatch`` where a cache was begun with other features than are asked for."""
    differing = [
        f"  {name}: the cache has {ours}, asked for {theirs}"
        for name, ours, theirs in recorded.differences(asked)
    ]
    if differing:
        raise CacheMismatch(
            "the cache was made with other settings:\n"
            + "\n".join(differing)
            + "\nuse another --cache directory, or delete this one and preload again"
        )


def _measures_alike(recorded: FeaturePlan, settings: FrozenSettings, size: tuple[int, int]) -> bool:
    """Whether the mean and deviation of ``recorded`` are of images read and fitted as now."""
    before = (recorded.preprocessing.size, recorded.preprocessing.fit, recorded.reading)
    return before == (size, settings.fit, reading_of(settings))


def choose_normalization(
    settings: FrozenSettings,
    spec: BackboneSpec,
    size: tuple[int, int],
    images: ImageSet,
    world: World = ALONE,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation of the channels, as ``settings`` say: given, named, or measured."""
    if settings.mean is not None or settings.std is not None:
        if settings.mean is None or settings.std is None:
            raise ConfigError("--mean and --std go together; give both or neither")
        if min(settings.std) <= 0:
            raise ConfigError(f"std must be above 0 in every channel, got {settings.std}")
        return settings.mean, settings.std
    if settings.normalization == "backbone":
        return spec.mean, spec.std
    if settings.normalization != "auto":
        preset = dataset_preset(settings.normalization)
        return preset.mean, preset.std
    mean, std = measure_statistics(
        images.of_split("train"),
        size=size,
        fit=settings.fit,
        workers=settings.workers,
        world=world,
    )
    if min(std) <= 0:
        raise ConfigError(
            f"the training images are constant in a channel (std {std}), so they cannot be "
            "normalised by measurement; use --normalization backbone, or give --mean and --std"
        )
    log.info(
        "normalisation measured on the training images: mean %s, std %s",
        " ".join(f"{value:.4f}" for value in mean),
        " ".join(f"{value:.4f}" for value in std),
    )
    return mean, std
