"""What the black padding of ``--fit pad`` takes: of the input, and of the tokens that are kept."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fpt_fast.doctor.findings import Finding
from fpt_fast.images.transforms import padded_size

Size = tuple[int, int]

# Below this share of the input nobody would choose another one for it, nor for so much less of it.
_WORTH_SAYING, _WORTH_CHANGING = 0.1, 0.05
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
    advice = _advice(sizes, input_size, patch_size, padding)
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
        f"what is kept there the image misses, and its shape may be learned instead; {advice}; "
        "--token-ratio can be raised; kept.png of fpt-fast explain shows it"
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


def least_padded(
    sizes: Sequence[Size], input_size: Size, patch_size: Size
) -> tuple[Size, float, float]:
    """The input of about as many patches of which padding takes least, as a mean over images of
    ``sizes``: its size, the share of its patches and, which decides among equals, of its area."""
    patches = (input_size[0] // patch_size[0]) * (input_size[1] // patch_size[1])
    shapes = [height / width for height, width in sizes]
    # Beyond the shapes that images have, padding only grows.
    first, last = (
        math.sqrt(patches * shape * patch_size[1] / patch_size[0])
        for shape in (min(shapes), max(shapes))
    )
    counts = Counter(sizes)
    found = []
    for rows in range(min(patches, max(1, math.floor(first))), min(patches, math.ceil(last)) + 1):
        size = (rows * patch_size[0], max(1, round(patches / rows)) * patch_size[1])
        of_patches = of_area = 0.0
        for image, count in counts.items():
            shares = _shares(image, size, patch_size)
            of_patches += shares[0] * count
            of_area += shares[1] * count
        found.append((round(of_patches / len(sizes), 9), of_area / len(sizes), size))
    least, area, best = min(found)
    return best, least, area


def _shares(image: Size, input_size: Size, patch_size: Size) -> tuple[float, float]:
    """Share of the patches that are padding throughout, as ``padding_of`` has them, and of the
    area that is padding."""
    whole = padded_size(image, input_size)
    inside = 1
    for axis in (0, 1):
        scale = input_size[axis] / whole[axis]
        begin = (whole[axis] - image[axis]) // 2 * scale
        last = math.ceil((begin + image[axis] * scale) / patch_size[axis])
        inside *= min(last, input_size[axis] // patch_size[axis]) - int(begin // patch_size[axis])
    patches = (input_size[0] // patch_size[0]) * (input_size[1] // patch_size[1])
    return 1 - inside / patches, 1 - image[0] * image[1] / (whole[0] * whole[1])


def _advice(sizes: Sequence[Size], input_size: Size, patch_size: Size, padding: float) -> str:
    """The input with the least padding, unless what there is has hardly more."""
    size, least, _ = least_padded(sizes, input_size, patch_size)
    if padding - least < _WORTH_CHANGING:
        return "no shape of about as many patches has much less, as these images differ in shape"
    return (
        f"--input-size {'x'.join(map(str, size))} has about as many patches, and padding takes "
        f"{least:.0%} of it: no other shape has less over these images"
    )


def _kept_in_padding(kept: Tensor, padding: Tensor, prefix_tokens: int) -> Tensor:
    """Share of the patches kept in each layer that are padding: [L] f64, prefix tokens left out."""
    whole = torch.nn.functional.pad(padding, (prefix_tokens, 0))  # [images, tokens]
    of_kept = whole.gather(1, kept.flatten(1).long()).view(kept.shape)
    patches = kept >= prefix_tokens
    return of_kept.double().sum((0, 2, 3)) / patches.double().sum((0, 2, 3)).clamp_min(1)
