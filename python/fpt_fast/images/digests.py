"""Digests of image files: whether an image is still the one that it was."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from fpt_fast.images.decode import ImageError
from fpt_fast.records import ImageItem


def digest_images(items: Sequence[ImageItem], *, workers: int = 2) -> dict[str, str]:
    """xxh3-64 of each file's bytes, 16 hexadecimal digits by key; raises ``ImageError``."""

    def digest(item: ImageItem) -> str:
        try:
            return xxhash.xxh3_64_hexdigest(item.path.read_bytes())
        except OSError as error:
            raise ImageError(item.path, f"cannot be read: {error.strerror}") from error

    with ThreadPoolExecutor(max(1, workers)) as threads:
        return dict(zip((item.key for item in items), threads.map(digest, items), strict=True))
