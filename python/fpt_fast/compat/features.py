"""Features that the authors' ``preload.py`` wrote: one ``<stem>.safetensors`` per image."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fpt_fast.cache import RecordLayout
from fpt_fast.records import ImageItem, ImageSet, SelectedTokens

REFERENCE_DIFFERENCES: tuple[str, ...] = (
    "values are rounded from f32 to f16",
    "the files do not say which frozen model, weights, layers, token ratio, importance, input "
    "size or normalisation made them: the cache's fingerprint records what you said, unverified",
    "the files do not say which tokens were kept: every index is -1, so that the report cannot "
    "draw them",
    "tokens stay in the files' order, best first, where ours are in ascending order; the model "
    "does not depend on it",
    "the images were decoded and resized by Pillow and the positions interpolated as by "
    "transformers 4.29: features made here differ slightly",
    "the files are matched to images by file stem alone, as there: that each belongs to the image "
    "of that name cannot be verified",
)

# f16's largest finite number.
_LARGEST = float(torch.finfo(torch.float16).max)
_MAX_NAMED = 5


class ReferenceFeaturesError(ValueError):
    """Preloaded features that cannot be imported; names files and images, and what to do."""


def read_reference_features(
    folder: str | Path, image_set: ImageSet, layout: RecordLayout
) -> Iterator[tuple[int, SelectedTokens]]:
    """Yield ``(position in image_set.items, tokens)`` for every image, in their order.

    Each ``tokens`` is one image: ``kv`` [1, L, 2, H, K, D] f16 and ``index`` [1, L, H, K] i32,
    all -1 since the files do not record it.  ``layout`` gives the L, H, K, D to expect.
    ``REFERENCE_DIFFERENCES`` says what differs from features made here.

    Before anything is yielded, raises ``ReferenceFeaturesError`` where two images share a stem
    (their files are then one, and whose it is cannot be known) or where images have no file;
    while yielding, where a file is damaged, has another shape, or holds a value that is not
    finite in f16.  Raises ``FileNotFoundError`` where the folder is missing.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder of preloaded features")
    _refuse_shared_stems(image_set.items)
    paths = [root / f"{item.path.stem}.safetensors" for item in image_set.items]
    missing = [
        item.key for item, path in zip(image_set.items, paths, strict=True) if not path.is_file()
    ]
    if missing:
        raise ReferenceFeaturesError(
            f"{len(missing)} of {len(paths)} images have no file in {root}: {_some(missing)}; "
            "their preload was killed, or this is another data set"
        )
    return _read_all(paths, image_set.items, layout)


def _read_all(
    paths: list[Path], items: tuple[ImageItem, ...], layout: RecordLayout
) -> Iterator[tuple[int, SelectedTokens]]:
    expected = (layout.layers, layout.heads, layout.kept, layout.head_width)
    index = torch.full((1, *expected[:3]), -1, dtype=torch.int32)
    for position, (path, item) in enumerate(zip(paths, items, strict=True)):
        keys, values = (
            _read_states(path, name, expected, item.key) for name in ("key_states", "value_states")
        )
        yield position, SelectedTokens(torch.stack((keys, values), dim=1)[None], index.clone())


def _read_states(path: Path, name: str, expected: tuple[int, ...], key: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            states: Tensor = file.get_tensor(name)
    except (SafetensorError, UnicodeDecodeError) as error:
        raise ReferenceFeaturesError(f"{path} ({key}) lacks a sound {name}: {error}") from error
    if tuple(states.shape) != expected or not states.is_floating_point():
        raise ReferenceFeaturesError(
            f"{path} ({key}): {name} must be {expected} (layers, heads, kept tokens, head width) "
            f"of a floating-point dtype, got {tuple(states.shape)} {states.dtype}; give the "
            "layers, token ratio, input size and backbone that it was preloaded with"
        )
    # NaN fails the comparison, too.
    if not bool((states.abs() <= _LARGEST).all()):
        raise ReferenceFeaturesError(
            f"{path} ({key}): {name} holds NaN, infinity or a value beyond {_LARGEST:.0f}, the "
            "largest of f16"
        )
    return states.to(torch.float16)


def _refuse_shared_stems(items: tuple[ImageItem, ...]) -> None:
    counts = Counter(item.path.stem for item in items)
    shared = [item.key for item in items if counts[item.path.stem] > 1]
    if shared:
        raise ReferenceFeaturesError(
            f"{len(shared)} images share their file stem with another: {_some(shared)}; their "
            "features were written over each other, so they cannot be imported: preload again "
            "with fpt-fast preload"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_MAX_NAMED]) + (" ..." if len(names) > _MAX_NAMED else "")
