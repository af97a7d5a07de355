"""What the black padding of ``--fit pad`` takes: of the input, and of the tokens that are kept."""

import math
import statistics
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fpt_fast.doctor.findings import Finding
from fpt_fast.images.transforms import padded_size

Size = tuple[int, int]

# Below this share of the input nobody would choose another one for it.
_WORTH_SAYING = 0.1
# Shares of the kept tokens that the image misses: where that is more than chance, and at all.
_SOME, _MANY = 0.05, 0.2


def find_in_padding(
    sizes: Sequence[Size],
    input_size: Size,
    patch_size: Size = (16, 16),
    *,
    kept: Tensor | None = None,
    prefix_tokens: int = 0,
    layers: Sequence[int] = (),
) -> Iterator[Finding]:
    """Of images of ``sizes`` (height, width): how much of the padded input is padding; and with
    ``kept`` [images, L, H, K], the index of the tokens kept of each in ``layers``
    (``prefix_tokens`` first, then the patches row by row), how much of that."""
    masks = torch.stack([padding_of(size, input_size, patch_size) for size in sizes])
    padding = float(masks.float().mean())
    advice = (
        f"--input-size {'x'.join(map(str, shape_of_most(sizes, input_size, patch_size)))} has the "
        "shape of most images and as many patches"
    )
    if kept is None:
        if padding >= _WORTH_SAYING:
            yield Finding(
                "note",
                f"padding to the input's shape (--fit pad) takes {padding:.0%} of it",
                advice,
            )
        return
    if padding == 0:
        return
    shares = _kept_in_padding(kept, masks.flatten(1), prefix_tokens)  # [L]
    share = float(shares.mean())
    wasted = share >= (_SOME if share > padding else _MANY)
    yield Finding(
        "warning" if wasted else "note",
        f"{share:.0%} of the kept tokens lie in the black padding of --fit pad, which takes "
        f"{padding:.0%} of the input",
        f"what is kept there the image misses, and its shape may be learned instead: {advice}; or "
        "raise --token-ratio; kept.png of fpt-fast explain shows it"
        if wasted
        else "",
        tuple(f"layer {n}: {float(s):.0%}" for n, s in zip(layers, shares, strict=True))
        if wasted
        else (),
    )


def padding_of(image: Size, input_size: Size, patch_size: Size) -> Tensor:
    """Whether each patch of the input is padding throughout: [rows, columns] bool."""
    whole = padded_size(image, input_size)
    inside = []
    for axis in (0, 1):
        scale = input_size[axis] / whole[axis]
        begin = (whole[axis] - image[axis]) // 2 * scale
        end = begin + image[axis] * scale
        edges = torch.arange(0, input_size[axis] + 1, patch_size[axis], dtype=torch.float64)
        inside.append((edges[1:] > begin) & (edges[:-1] < end))
    return ~(inside[0][:, None] & inside[1][None])


def shape_of_most(sizes: Sequence[Size], input_size: Size, patch_size: Size) -> Size:
    """An input of about as many patches in the middle one of the images' shapes."""
    patches = (input_size[0] // patch_size[0]) * (input_size[1] // patch_size[1])
    shape = statistics.median(height / width for height, width in sizes)
    rows = max(1, round(math.sqrt(patches * shape * patch_size[1] / patch_size[0])))
    return rows * patch_size[0], max(1, round(patches / rows)) * patch_size[1]


def _kept_in_padding(kept: Tensor, padding: Tensor, prefix_tokens: int) -> Tensor:
    """Share of the patches kept in each layer that are padding: [L] f64, prefix tokens left out."""
    whole = torch.nn.functional.pad(padding, (prefix_tokens, 0))  # [images, tokens]
    of_kept = whole.gather(1, kept.flatten(1).long()).view(kept.shape)
    patches = kept >= prefix_tokens
    return of_kept.double().sum((0, 2, 3)) / patches.double().sum((0, 2, 3)).clamp_min(1)
