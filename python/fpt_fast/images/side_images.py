"""The side input of a whole split, decoded and shrunk once instead of in every epoch.

To be augmented, images are kept at about twice the side input's size, so that any crop still has
more pixels than the input; without augmentation they are kept at the side input's size, as the
network sees them.  Images of 16 bits keep them: data of 12 bits in files of 16 would be left with
16 levels in 8.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from fpt_fast.config import ConfigError
from fpt_fast.distributed import ALONE, World, processes_here
from fpt_fast.files import sync_directory
from fpt_fast.images.decode import read_item
from fpt_fast.images.digests import digest_images
from fpt_fast.images.parallel import ordered_map
from fpt_fast.images.store import memory_bytes
from fpt_fast.images.transforms import fit_image, merge_grey, resize_levels
from fpt_fast.records import AS_THE_FILE_SAYS, ImageItem, Preprocessing

log = logging.getLogger("fpt_fast")

OVERSIZE = 2
"""Edge of an image kept for augmentation over that of the side input."""

_AT = "shrinking the images"
_FORMAT = "fpt-fast side images 1"
_TENSORS = ("levels", "extents", "originals")


@dataclass(frozen=True, slots=True)
class SideImages:
    """``M`` shrunk images: ``levels`` [M, 3, h, w] u8, or u16 or f32 on the scale of u16.

    Image *i* fills ``levels[i, :, :rows, :columns]`` with (rows, columns) = ``extents[i]``
    ([M, 2] i64); the rest is 0.  ``originals`` [M, 2] i64 are its (height, width) in the file,
    or as padded.
    """

    levels: Tensor
    extents: Tensor
    originals: Tensor

    def __len__(self) -> int:
        return len(self.levels)

    @property
    def full_scale(self) -> float:
        """The level of white."""
        return 255.0 if self.levels.dtype == torch.uint8 else 65535.0


def shrink_images(
    items: Sequence[ImageItem],
    side: Preprocessing,
    *,
    augmented: bool,
    workers: int = 2,
    directory: Path | None = None,
    world: World = ALONE,
) -> SideImages:
    """Decode, fit and shrink ``items`` for the input ``side``.

    With ``augmented``, to at most ``OVERSIZE`` times its size, and never up; else to that size
    exactly, as ``to_network_input`` does it.  With ``directory`` the result is kept there in a
    file named by the size and the images' digests, and read from it the next time; a file that
    is damaged or of other images is not used, but made anew.  The ranks of ``world`` share the
    images, and each returns all of them.

    Raises ``ImageError`` for an image that cannot be read, ``ConfigError`` where the memory of
    this machine does not hold them.
    """
    height, width = side.size
    bound = (OVERSIZE * height, OVERSIZE * width) if augmented else side.size
    _check_memory(len(items), bound)
    if directory is None:
        return _shrink_together(items, side, bound, augmented, workers, world)
    identity = _identity(items, side, bound, augmented, workers, world)
    name = xxhash.xxh3_64_hexdigest(json.dumps(identity, sort_keys=True).encode())
    path = directory / f"side-{name}.safetensors"
    kept = read_side_images(path, identity)
    # Where one rank does not see the file, all make it anew.
    if kept is None or world.any(kept is None, _AT):
        kept = _shrink_together(items, side, bound, augmented, workers, world)
        if world.is_first:
            write_side_images(path, kept, identity)
    return kept


def _shrink_together(
    items: Sequence[ImageItem],
    side: Preprocessing,
    bound: tuple[int, int],
    augmented: bool,
    workers: int,
    world: World,
) -> SideImages:
    """``_shrink``, each rank its share."""
    mine = world.share(len(items))
    part = _shrink(items[mine.start : mine.stop], side, bound, augmented, workers)
    if world.size == 1:
        return part
    levels = part.levels
    if world.any(levels.dtype != torch.uint8, _AT) and levels.dtype == torch.uint8:
        levels = _deepened(levels, _deep_dtype(augmented))

    def of_all(own: Tensor) -> Tensor:
        whole = torch.zeros((len(items), *own.shape[1:]), dtype=own.dtype)
        # As bytes: not every operation knows u16.
        whole.view(torch.uint8)[mine.start : mine.stop] = own.view(torch.uint8)
        world.fill_shares(whole, _AT)
        return whole

    return SideImages(of_all(levels), of_all(part.extents), of_all(part.originals))


def _deep_dtype(augmented: bool) -> torch.dtype:
    """What levels are kept in where images have more than 8 bits."""
    return torch.uint16 if augmented else torch.float32


def _shrink(
    items: Sequence[ImageItem],
    side: Preprocessing,
    bound: tuple[int, int],
    augmented: bool,
    workers: int,
) -> SideImages:
    def load(item: ImageItem) -> tuple[Tensor, tuple[int, int]]:
        image = fit_image(read_item(item), side)
        height, width = image.shape[1:]
        size = (min(height, bound[0]), min(width, bound[1])) if augmented else bound
        return resize_levels(merge_grey(image), size), (height, width)

    levels = torch.zeros((len(items), 3, *bound), dtype=torch.uint8)
    extents = torch.empty((len(items), 2), dtype=torch.int64)
    originals = torch.empty((len(items), 2), dtype=torch.int64)
    deep = _deep_dtype(augmented)
    with closing(ordered_map(load, items, workers=workers, ahead=2 * workers)) as shrunk:
        progress = tqdm(shrunk, total=len(items), desc="side images", unit="image", disable=None)
        for i, (small, original) in enumerate(progress):
            if small.dtype != torch.uint8 and levels.dtype == torch.uint8:
                levels = _deepened(levels, deep)
            elif small.dtype == torch.uint8 and levels.dtype != torch.uint8:
                small = _deepened(small, deep)
            elif small.dtype != levels.dtype:
                small = small.round().to(levels.dtype)
            rows, columns = small.shape[1:]
            levels[i, :, :rows, :columns] = small
            extents[i] = torch.tensor((rows, columns))
            originals[i] = torch.tensor(original)
    return SideImages(levels, extents, originals)


def _deepened(levels: Tensor, dtype: torch.dtype) -> Tensor:
    """u8 on the scale of 16 bits."""
    return (levels.to(torch.int32) * 257).to(dtype)


def _check_memory(count: int, size: tuple[int, int]) -> None:
    processes = processes_here()
    need, limit = processes * count * 3 * size[0] * size[1], memory_bytes() // 2
    if need > limit:
        times = "" if processes == 1 else f" in {processes} processes"
        raise ConfigError(
            f"the side images of {count} images{times} take {need / 1e9:.1f} GB, and half of this "
            f"machine's memory is {limit / 1e9:.1f} GB; decode them in every epoch instead with "
            "--side-images exact"
        )


def _identity(
    items: Sequence[ImageItem],
    side: Preprocessing,
    bound: tuple[int, int],
    augmented: bool,
    workers: int,
    world: World,
) -> dict[str, object]:
    digests = digest_images(items, workers=workers, world=world)
    # Only what is not as it has always been: older files stay valid.
    special: dict[str, object] = {} if side.fit == "stretch" else {"fit": side.fit}
    if any(item.reading != AS_THE_FILE_SAYS for item in items):
        special["readings"] = [list(dataclasses.astuple(item.reading)) for item in items]
    return {
        **special,
        "format": _FORMAT,
        "size": list(bound),
        "augmented": augmented,
        "images": xxhash.xxh3_128_hexdigest(json.dumps(list(digests.items())).encode()),
    }


def write_side_images(path: Path, images: SideImages, identity: Mapping[str, object]) -> None:
    """Replace ``path`` by ``images``, whole or not at all."""
    tensors = {name: getattr(images, name) for name in _TENSORS}
    metadata = {
        "identity": json.dumps(identity, sort_keys=True),
        "checksum": _checksum(images),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata=metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def read_side_images(path: Path, identity: Mapping[str, object]) -> SideImages | None:
    """What ``write_side_images`` wrote, or None where it is not there or must not be used."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != json.dumps(identity, sort_keys=True):
                log.warning("%s is of other images or settings: it is made anew", path)
                return None
            images = SideImages(*(file.get_tensor(name) for name in _TENSORS))
    except (OSError, SafetensorError) as error:
        log.warning("%s cannot be read (%s): it is made anew", path, error)
        return None
    if metadata.get("checksum") != _checksum(images):
        log.warning("%s does not match its checksum: it is made anew", path)
        return None
    return images


def _checksum(images: SideImages) -> str:
    state = xxhash.xxh3_128()
    for name in _TENSORS:
        tensor: Tensor = getattr(images, name)
        state.update(str((name, tensor.dtype, tuple(tensor.shape))).encode())
        state.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
