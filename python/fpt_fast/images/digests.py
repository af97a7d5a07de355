"""Digests of image files: whether an image is still the one that it was."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
import xxhash

from fpt_fast.distributed import ALONE, World
from fpt_fast.images.decode import ImageError
from fpt_fast.records import ImageItem

_BYTES = 8
_NONE = torch.zeros(0, dtype=torch.uint8)


def digest_images(
    items: Sequence[ImageItem], *, workers: int = 2, world: World = ALONE
) -> dict[str, str]:
    """xxh3-64 of each file's bytes, 16 hexadecimal digits by key; the ranks of ``world`` share
    the files.  Raises ``ImageError``."""

    def digest(item: ImageItem) -> bytes:
        try:
            return xxhash.xxh3_64_digest(item.path.read_bytes())
        except OSError as error:
            raise ImageError(item.path, f"cannot be read: {error.strerror}") from error

    mine = world.share(len(items))
    with ThreadPoolExecutor(max(1, workers)) as threads:
        digests = list(threads.map(digest, items[mine.start : mine.stop]))
    part = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8) if digests else _NONE
    whole = world.gather_shares(part.view(-1, _BYTES), len(items), "reading the images")
    return {item.key: row.numpy().tobytes().hex() for item, row in zip(items, whole, strict=True)}
