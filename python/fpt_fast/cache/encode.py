"""From tensors to the bytes of records: what is refused, and where each part goes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpt_fast.cache.errors import FeatureValueError
from fpt_fast.cache.layout import RecordLayout
from fpt_fast.records import SelectedTokens

# Keys and values [B, L, 2, H, K, D] f16 -> kv in 8 bits, k_scales and v_scales (ops.quantise_kv).
Quantise = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# All bits of exponent and mantissa set: the one NaN of float8_e4m3fn, which has no infinity.
_FLOAT8_NAN = 0x7F


@dataclass(frozen=True, slots=True)
class RecordMaker:
    """Makes the records of images ``keys`` out of their tokens.

    ``layer_names``: what an error calls each of the layout's layers.
    """

    layout: RecordLayout
    keys: Sequence[str]
    layer_names: Sequence[object]
    quantise: Quantise | None

    def check(self, positions: Sequence[int], tokens: SelectedTokens) -> None:
        """Raise ``ValueError`` unless ``tokens`` are of the layout, one for each of
        ``positions``."""
        check_tokens(self.layout, len(positions), tokens, quantises=self.quantise is not None)

    def make(
        self, positions: Sequence[int], tokens: SelectedTokens, chosen: Sequence[int]
    ) -> Iterator[memoryview]:
        """The records of those of ``tokens``, one for each of ``positions`` in ``keys``, whose
        places in them are ``chosen``; the buffer is the same one each time.

        Raises ``FeatureValueError`` as ``stored_tokens`` does.
        """
        if len(chosen) < len(positions):
            tokens = _picked(tokens, chosen)

        def where(image: int, layer: int) -> str:
            key = self.keys[positions[chosen[image]]]
            return f"the features of {key!r}, layer {self.layer_names[layer]}"

        return record_bytes(self.layout, stored_tokens(tokens, self.quantise, where))


def layer_names(layout: RecordLayout, fingerprint: Mapping[str, Any]) -> list[object]:
    """The layers of ``layout`` by the frozen model's count, where the fingerprint has them."""
    names = fingerprint.get("layers")
    if isinstance(names, list) and len(names) == layout.layers:
        return names
    return list(range(layout.layers))


def _picked(tokens: SelectedTokens, images: Sequence[int]) -> SelectedTokens:
    return SelectedTokens(
        tokens.kv[images],
        tokens.index[images],
        None if tokens.k_scales is None else tokens.k_scales[images],
        None if tokens.v_scales is None else tokens.v_scales[images],
    )


def check_tokens(
    layout: RecordLayout, images: int, tokens: SelectedTokens, *, quantises: bool
) -> None:
    """Raise ``ValueError`` unless ``tokens`` hold ``images`` records of ``layout``.

    With ``quantises``, 8-bit records may come as kv in floating point, without scales.
    """
    if quantises and tokens.k_scales is None and tokens.v_scales is None:
        layout = replace(layout, dtype="float16")
    axes = {
        "kv": "B, L, 2, H, K, D",
        "k_scales": "B, L, H, D",
        "v_scales": "B, L, H, K",
        "index": "B, L, H, K",
    }
    given = {name: getattr(tokens, name) for name in axes}
    for part in layout.parts:
        tensor, shape = given.pop(part.name), (images, *part.shape)
        dtypes: tuple[torch.dtype, ...] = (getattr(torch, part.dtype),)
        wanted = f"torch.{part.dtype}"
        if part.name == "kv" and not layout.has_scales:
            dtypes, wanted = _FLOATS, "f16, bf16, f32 or f64"
        if tensor is None or tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            got = "None" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            advice = "; ops.quantise_kv makes 8-bit kv and its scales" if layout.has_scales else ""
            raise ValueError(
                f"{part.name} must be [{axes[part.name]}] = {shape} of {wanted}, got {got}{advice}"
            )
    for name, tensor in given.items():
        if tensor is not None:
            raise ValueError(
                f"{name} must be None in a cache of {layout.dtype} features, which has no scales, "
                f"got {tuple(tensor.shape)}"
            )


def stored_tokens(
    tokens: SelectedTokens, quantise: Quantise | None, where: Callable[[int, int], str]
) -> SelectedTokens:
    """``tokens`` as they are stored: kv rounded to f16 and from there by ``quantise`` to 8 bits;
    8-bit kv as it is.

    Raises ``FeatureValueError`` for what the cache cannot hold, NaN, infinity and overflow of
    f16; ``where(image, layer)`` names the place.
    """
    if tokens.k_scales is not None:
        _refuse_bad_scales(tokens, where)
        return tokens
    half = tokens.kv.to(torch.float16)
    bad = ~torch.isfinite(half).flatten(2).all(dim=-1)  # [B, L]
    if bool(bad.any()):
        image, layer = _first(bad)
        values = tokens.kv[image, layer]
        place = f"{where(image, layer)} (and {int(bad.sum()) - 1} more layers of this batch)"
        if bool(torch.isfinite(values).all()):
            raise FeatureValueError(
                f"{place}: reach {float(values.abs().max()):.4g}, and f16 ends at 65504; the "
                "frozen model's weights are not what the cache can hold: check the checkpoint"
            )
        raise FeatureValueError(
            f"{place}: hold {int((~torch.isfinite(values)).sum())} NaN or infinite values (or "
            "values beyond f16, which ends at 65504); check the checkpoint and the image, and run "
            "the frozen model in float32 or bfloat16 if it ran in float16"
        )
    if quantise is None:
        return SelectedTokens(half, tokens.index)
    kv, k_scales, v_scales = quantise(half)
    return SelectedTokens(kv, tokens.index, k_scales, v_scales)


def record_bytes(layout: RecordLayout, tokens: SelectedTokens) -> Iterator[memoryview]:
    """The record of each image of ``stored_tokens``; the buffer is the same one each time."""
    record = np.zeros(layout.record_bytes, np.uint8)
    sources = []
    for part in layout.parts:
        tensor: Tensor = getattr(tokens, part.name)
        sources.append((part, tensor.detach().cpu().contiguous().view(torch.uint8).numpy()))
    for image in range(tokens.kv.shape[0]):
        for part, values in sources:
            record[part.offset : part.offset + part.bytes] = values[image].reshape(-1)
        yield record.data


def _refuse_bad_scales(tokens: SelectedTokens, where: Callable[[int, int], str]) -> None:
    for name in ("k_scales", "v_scales"):
        scales: Tensor = getattr(tokens, name)
        # NaN is not >= 0 either.
        bad = ~((scales >= 0) & torch.isfinite(scales)).flatten(2).all(dim=-1)  # [B, L]
        if bool(bad.any()):
            raise FeatureValueError(
                f"{where(*_first(bad))}: have {name} that are NaN, infinite or below 0, so the "
                "features that were quantised held NaN or infinity; check the checkpoint and the "
                "image, and run the frozen model in float32 or bfloat16 if it ran in float16"
            )
    if tokens.kv.dtype == torch.float8_e4m3fn:
        codes = tokens.kv.view(torch.uint8) & _FLOAT8_NAN
        bad = (codes == _FLOAT8_NAN).flatten(2).any(dim=-1)
        if bool(bad.any()):
            raise FeatureValueError(
                f"{where(*_first(bad))}: hold NaN; check the checkpoint and the image"
            )


def _first(bad: Tensor) -> tuple[int, int]:
    """Image and layer of the first True of [B, L]."""
    image, layer = (int(i) for i in bad.nonzero()[0])
    return image, layer
