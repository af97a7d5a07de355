"""Where a batch's keys and values come from: the cache, a frozen pass per batch, or nowhere."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fpt_fast.backbone import FrozenBackbone
from fpt_fast.cache import CacheReader
from fpt_fast.config import AugmentConfig
from fpt_fast.images import SideAugmentation, to_network_input
from fpt_fast.loader.streams import FROZEN_STREAM, stream_generator
from fpt_fast.ops import quantise_kv
from fpt_fast.profiling import span
from fpt_fast.records import (
    FeatureDtype,
    ImageItem,
    Importance,
    KeptFeatures,
    Preprocessing,
    SelectedTokens,
)
from fpt_fast.selection import select_features


@dataclass(frozen=True, slots=True)
class FrozenPass:
    """A frozen model and what to take from it: the settings that a cache has in its fingerprint.

    ``features`` is the dtype that the features have in the cache, and so for the model.
    """

    backbone: FrozenBackbone
    preprocessing: Preprocessing
    layers: tuple[int, ...]
    token_ratio: float
    importance: Importance
    features: FeatureDtype = "float16"

    def __call__(self, pixels: Tensor) -> Tensor:
        """``pixels`` [B, 3, h, w] f32 -> kept keys and values [B, L, 2, H, K, D] f16, on the
        backbone's device."""
        return self.select(pixels).kv

    def select(self, pixels: Tensor) -> SelectedTokens:
        """The same, with the index of the tokens that they are of."""
        return select_features(
            self.backbone,
            pixels,
            layers=self.layers,
            token_ratio=self.token_ratio,
            importance=self.importance,
        )


class FeatureSource(Protocol):
    """Where a batch's keys and values come from; ``needs_images`` where it looks at images."""

    needs_images: bool

    def __call__(
        self, items: Sequence[ImageItem], images: Sequence[Tensor], seeds: Sequence[int]
    ) -> KeptFeatures | None:
        """Kept keys and values of ``items``.

        A source that ``needs_images`` is given the decoded ``images``, and ``seeds``, one an
        image, to augment them; for another both are empty.
        """
        ...

    def announce(self, items: Sequence[ImageItem]) -> None:
        """Say that ``items`` will be asked for soon."""
        ...


class CachedFeatures:
    """Features of a cache, by key; refuses at once a data set that the cache does not cover.

    ``in_place``: where the reader has mapped the cache, batches point into it (``rows``), and
    nothing is copied; for a model on the CPU.
    """

    needs_images = False

    def __init__(
        self, reader: CacheReader, items: Sequence[ImageItem], *, in_place: bool = False
    ) -> None:
        self._reader = reader
        self._in_place = in_place
        known = set(reader.keys)
        missing = [item.key for item in items if item.key not in known]
        if missing:
            shown = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
            raise ValueError(
                f"the feature cache lacks {len(missing)} of {len(items)} images ({shown}). "
                "If they were left out as unreadable when it was made, leave them out here too: "
                "--skip-unreadable; if the data grew or is another, run preload again on it"
            )

    def __call__(
        self, items: Sequence[ImageItem], images: Sequence[Tensor], seeds: Sequence[int]
    ) -> KeptFeatures:
        """Read and check the records of ``items``; ``images`` are not looked at."""
        rows = [self._reader.row(item.key) for item in items]
        with span("read"):
            store = self._reader.view(rows) if self._in_place else None
            if store is not None:
                picked = torch.tensor(rows, dtype=torch.int64)
                return KeptFeatures(store.kv, picked, store.k_scales, store.v_scales)
            read = self._reader.read(rows)
        return KeptFeatures(read.kv, None, read.k_scales, read.v_scales)

    def announce(self, items: Sequence[ImageItem]) -> None:
        """Have the disk work ahead."""
        self._reader.announce([self._reader.row(item.key) for item in items])


class LiveFeatures:
    """Features of a frozen pass made for the batch; its input may be augmented."""

    needs_images = True

    def __init__(self, frozen: FrozenPass, augmentation: AugmentConfig | None = None) -> None:
        self._frozen = frozen
        self._lock = threading.Lock()
        self._augment = (
            None if augmentation is None else SideAugmentation(augmentation, frozen.preprocessing)
        )

    def __call__(
        self, items: Sequence[ImageItem], images: Sequence[Tensor], seeds: Sequence[int]
    ) -> KeptFeatures:
        """Run the frozen model on ``images``; 8-bit features are made as a cache has them."""
        pixels = torch.stack(
            [
                to_network_input(image, self._frozen.preprocessing)
                if self._augment is None
                else self._augment(image, stream_generator(seeds[i], FROZEN_STREAM))
                for i, image in enumerate(images)
            ]
        )  # [B, 3, h, w]
        return self.of_pixels([item.key for item in items], pixels)

    def of_pixels(self, keys: Sequence[str], pixels: Tensor) -> KeptFeatures:
        """Features of ``pixels`` [B, 3, h, w] f32, the frozen model's input of images ``keys``."""
        # One pass at a time: each fills the machine, and several would take its memory.
        with self._lock:
            kv = self._frozen(pixels)
        finite = torch.isfinite(kv).flatten(1).all(dim=1)
        if not bool(finite.all()):
            names = ", ".join(key for key, ok in zip(keys, finite, strict=True) if not ok)
            raise ValueError(
                f"the frozen model gave NaN, infinity or values beyond f16 for {names}; check its "
                "weights and these images, or run it with --dtype float32"
            )
        if self._frozen.features == "float16":
            return KeptFeatures(kv)
        kv, k_scales, v_scales = quantise_kv(kv, getattr(torch, self._frozen.features))
        return KeptFeatures(kv, None, k_scales, v_scales)

    def announce(self, items: Sequence[ImageItem]) -> None:
        """Nothing to do ahead."""


class NoFeatures:
    """For a side network alone."""

    needs_images = False

    def __call__(
        self, items: Sequence[ImageItem], images: Sequence[Tensor], seeds: Sequence[int]
    ) -> None:
        """Nothing."""
        return None

    def announce(self, items: Sequence[ImageItem]) -> None:
        """Nothing to do ahead."""
