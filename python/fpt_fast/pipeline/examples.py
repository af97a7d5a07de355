"""Images with the tokens that were kept of them, and where the prompts look."""

import dataclasses
import io
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fpt_fast.cache import CacheReader
from fpt_fast.explanation import prompt_weights
from fpt_fast.fusion import PromptFusion
from fpt_fast.images import DecodedStore, fit_image
from fpt_fast.metrics import predicted_classes
from fpt_fast.model import FptModel
from fpt_fast.pipeline.features import FeaturePlan
from fpt_fast.records import (
    ImageItem,
    Predictions,
    Preprocessing,
    SelectedTokens,
    TokenExample,
)
from fpt_fast.report import worst_first

# Twice the edge at which the table shows it.
THUMBNAIL_EDGE = 128


def token_examples(
    items: Sequence[ImageItem],
    predictions: Predictions,
    plan: FeaturePlan,
    reader: CacheReader | None,
    store: DecodedStore,
    model: FptModel,
    *,
    num_classes: int,
    count: int,
) -> list[TokenExample]:
    """Choose up to ``count`` images spread over ``items``, look up what was kept of them and where
    the prompts of ``model`` look.

    Without a cache, or with an imported one, nothing records the kept tokens: no example.
    """
    if reader is None or model.fusion is None or count < 1:
        return []
    positions = torch.linspace(0, len(items) - 1, min(count, len(items))).round().int().tolist()
    chosen = [items[position] for position in positions]
    rows = {key: row for row, key in enumerate(predictions.keys)}
    read = reader.read([reader.row(item.key) for item in chosen])
    if bool((read.index < 0).any()):
        # Features imported from the authors' code do not say which tokens they are of.
        return []
    images = [store.get(item) for item in chosen]
    said = _of_rows(predictions, [rows[item.key] for item in chosen])
    return make_examples(chosen, images, read, said, plan, model.fusion, num_classes=num_classes)


def make_examples(
    items: Sequence[ImageItem],
    images: Sequence[Tensor],
    selected: SelectedTokens,
    said: Predictions | None,
    plan: FeaturePlan,
    fusion: PromptFusion,
    *,
    num_classes: int,
) -> list[TokenExample]:
    """What was kept of ``items``, decoded as ``images``, and where the prompts look.

    ``selected`` [B, ...] are their features by ``plan``; ``said`` is what the model says of them,
    in their order (None: nobody asked).
    """
    scales = None
    if selected.k_scales is not None and selected.v_scales is not None:
        scales = (selected.k_scales, selected.v_scales)
    weights = prompt_weights(fusion, selected.kv, scales).cpu()  # [B, L, H, P, K]
    index = selected.index.cpu()
    size, patch = plan.preprocessing.size, plan.spec.patch_size
    none = torch.empty(len(items), 0)
    probabilities = none if said is None or said.probabilities is None else said.probabilities
    outputs: list[float | None] = [None] * len(items)
    grades: list[int | None] = [None] * len(items)
    if said is not None and said.probabilities is None:
        outputs = said.logits[:, 0].tolist()
        if not said.labels.is_floating_point():
            grades = predicted_classes(said, num_classes).tolist()
    return [
        TokenExample(
            key=item.key,
            pixels=_as_seen(images[i], plan.preprocessing),
            index=index[i],
            layers=plan.layers,
            grid=(size[0] // patch[0], size[1] // patch[1]),
            prefix_tokens=plan.spec.prefix_tokens,
            label=item.label,
            probabilities=probabilities[i],
            weights=weights[i],
            findings=item.findings,
            output=outputs[i],
            grade=grades[i],
            value=item.value,
        )
        for i, item in enumerate(items)
    ]


def draw_thumbnails(
    items: Sequence[ImageItem],
    predictions: Predictions,
    store: DecodedStore,
    *,
    num_classes: int,
    count: int,
) -> dict[str, bytes]:
    """JPEG files by key of the ``count`` images whose predictions are the worst."""
    by_key = {item.key: item for item in items}
    worst = worst_first(predictions, num_classes)[:count]
    return draw_pictures([by_key[key] for key in worst], store)


def draw_pictures(items: Sequence[ImageItem], store: DecodedStore) -> dict[str, bytes]:
    """A small JPEG file of each image, by key."""
    return {item.key: _thumbnail(store.get(item)) for item in items}


def _of_rows(predictions: Predictions, rows: list[int]) -> Predictions:
    probabilities = predictions.probabilities
    return dataclasses.replace(
        predictions,
        keys=tuple(predictions.keys[row] for row in rows),
        labels=predictions.labels[rows],
        logits=predictions.logits[rows],
        probabilities=None if probabilities is None else probabilities[rows],
    )


def _thumbnail(image: Tensor) -> bytes:
    """[3, h, w] u8 or u16, shrunk to fit ``THUMBNAIL_EDGE``, as JPEG."""
    height, width = image.shape[1:]
    scale = min(1.0, THUMBNAIL_EDGE / max(height, width))
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    small = F.to_dtype(F.resize(image, size, antialias=True), torch.uint8, scale=True)
    file = io.BytesIO()
    F.to_pil_image(small).save(file, "JPEG", quality=80)
    return file.getvalue()


def _as_seen(image: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The image at the frozen model's input size, 8 bit: [3, h, w] u8."""
    fitted = fit_image(image, preprocessing)
    resized = F.resize(fitted, list(preprocessing.size), antialias=True)
    seen: Tensor = F.to_dtype(resized, torch.uint8, scale=True)
    return seen
