"""Files to tensors: one image file becomes [3, h, w] u8 or u16, or an ``ImageError``.

DICOM, JPEG and 16-bit colour PNG have files of their own; all else goes through Pillow.  A
damaged file is an error, never half an image.
"""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from fpt_fast.images.dicom import MAGIC_BYTES, DicomRefused, decode_dicom, has_mark, is_dicom
from fpt_fast.images.jpeg import decode_whole_jpeg
from fpt_fast.images.png16 import HEADER_BYTES, decode_colour_png16, is_colour_png16
from fpt_fast.images.windows import U16_MAX, parse_window, window_u16
from fpt_fast.profiling import span
from fpt_fast.records import AS_THE_FILE_SAYS, ImageItem, Reading

Pixels = npt.NDArray[np.generic]

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "WEBP")
_JPEG_FORMATS = ("JPEG", "MPO")
_EXIF_ORIENTATION = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_SAMPLE_FORMAT = 339
_COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")
_GREY_MODES = ("1", "L", "LA", "La")

_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class ImageError(ValueError):
    """An image that cannot be used: ``path``, ``reason``, and its ``key`` in the data set."""

    def __init__(self, path: Path, reason: str, key: str | None = None) -> None:
        super().__init__(path, reason, key)
        self.path = path
        self.reason = reason
        self.key = str(path) if key is None else key

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class _RefusedError(ValueError):
    """A reason that is already fit for the reader."""


def read_image(
    path: str | Path, reading: Reading = AS_THE_FILE_SAYS, *, max_pixels: int | None = None
) -> Tensor:
    """Decode the image file at ``path`` to RGB [3, h, w], upright by its EXIF orientation.

    u8, or u16 with the file's own values where it has 16 bits a sample (full scale is 65535).
    Alpha is dropped, not blended, as ``PIL.Image.convert("RGB")`` does it; of several frames or
    pages the first is read, of DICOM that which ``reading`` names.  The channels of a grey image
    share memory: do not write to it.

    ``reading.window`` maps grey of more than 8 bits to black and white, DICOM by its own pipeline
    (``images/dicom.py``); other files have no window, and keep their values with ``file``.

    ``max_pixels`` refuses larger images; None leaves it to ``PIL.Image.MAX_IMAGE_PIXELS``,
    which refuses above twice its value.

    Raises ``ImageError`` where the file is missing, empty, damaged, truncated, of another format,
    too large, or of samples that have no right place in u8 or u16 (floats, negatives).
    """
    path = Path(path)
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError(
            "PIL.ImageFile.LOAD_TRUNCATED_IMAGES must be False, got True: with it a truncated "
            "image would be read as half grey; set it back before reading images"
        )
    try:
        with path.open("rb") as file:
            pixels = _decode(file, path.name, reading, max_pixels)
    except (_RefusedError, DicomRefused) as error:
        raise ImageError(path, str(error)) from None
    except FileNotFoundError:
        raise ImageError(path, "no such file") from None
    except IsADirectoryError:
        raise ImageError(path, "is a directory, not an image") from None
    except PermissionError:
        raise ImageError(path, "may not be read (permission denied)") from None
    except UnidentifiedImageError:
        reason = "not an image that can be decoded (PNG, JPEG, TIFF, BMP, WebP or DICOM)"
        raise ImageError(path, reason) from None
    except _DECODE_ERRORS as error:
        raise ImageError(path, f"damaged or unsupported ({_first_line(error)})") from error
    return _to_tensor(pixels)


def read_item(item: ImageItem) -> Tensor:
    """``read_image`` of a data set's image; the ``ImageError`` carries the item's key."""
    try:
        with span("decode"):
            return read_image(item.path, item.reading)
    except ImageError as error:
        raise ImageError(item.path, error.reason, item.key) from error.__cause__


_BEGINNINGS = {
    b"\x89PNG": "a PNG",
    b"\xff\xd8\xff": "a JPEG",
    b"II*\0": "a TIFF",
    b"MM\0*": "a TIFF",
    b"GIF8": "a GIF",
    b"BM": "a BMP",
    b"%PDF": "a PDF",
    b"PK\3\4": "a ZIP archive",
    b"\x1f\x8b": "a gzip archive",
}


def _begins_like(start: bytes) -> str | None:
    """Another kind of file that the first bytes are of; None where they tell nothing."""
    for beginning, kind in _BEGINNINGS.items():
        if start.startswith(beginning):
            return kind
    # DICOM without its preamble begins with a tag, two small numbers: never with letters.
    return "text" if start.isascii() and b"".join(start.split()).decode().isprintable() else None


def _decode(file: BinaryIO, name: str, reading: Reading, max_pixels: int | None) -> Pixels:
    """Decode an open file to [h, w, 1 or 3] u8 or u16, upright, through its window."""
    start = file.read(MAGIC_BYTES)
    if not start:
        raise _RefusedError("the file is empty")
    file.seek(0)
    if is_dicom(start, name):
        if not has_mark(start) and (kind := _begins_like(start)) is not None:
            raise _RefusedError(
                f"not a DICOM file in spite of its name: it begins like {kind}; give it its own "
                "ending, or remove it"
            )
        return decode_dicom(file, reading, _pixel_limit(max_pixels))
    pixels = _decode_picture(file, max_pixels)
    if pixels.dtype == np.uint16 and pixels.shape[2] == 1:
        return window_u16(pixels.astype(np.uint16, copy=False), reading.window)
    if parse_window(reading.window) is not None or reading.window == "minmax":
        raise _RefusedError(
            f"--window {reading.window} chooses the levels of grey images of more than 8 bits, and "
            f"this one {'has colour' if pixels.shape[2] == 3 else 'has 8 bits'}; leave --window "
            "out (file), or take such images out of the data"
        )
    return pixels


def _pixel_limit(max_pixels: int | None) -> int | None:
    """What Pillow holds to, for decoders that ask for nobody's leave."""
    if max_pixels is None and Image.MAX_IMAGE_PIXELS is not None:
        return 2 * Image.MAX_IMAGE_PIXELS
    return max_pixels


def _decode_picture(file: BinaryIO, max_pixels: int | None) -> Pixels:
    """Decode a file that is no DICOM to [h, w, 1 or 3] u8 or u16, upright."""
    with Image.open(file, formats=_FORMATS) as image:
        width, height = image.size
        if max_pixels is not None and width * height > max_pixels:
            raise _RefusedError(f"{width} x {height} pixels are more than {max_pixels} allowed")
        if image.format in _JPEG_FORMATS and image.mode in ("L", "RGB"):
            pixels = decode_whole_jpeg(_read_all(file), grey=image.mode == "L")
        elif image.format == "PNG" and is_colour_png16(_read_start(file)):
            pixels = decode_colour_png16(_read_all(file))
        else:
            pixels = _decode_with_pillow(image)
        # Pillow turns a TIFF upright while loading and then drops the tag: ask afterwards.
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    if pixels.shape[:2] not in ((height, width), (width, height)):
        raise _RefusedError(f"header says {width} x {height} pixels, data {pixels.shape[:2]}")
    return _turn_upright(pixels, orientation)


def _read_all(file: BinaryIO) -> bytearray:
    file.seek(0)
    return bytearray(file.read())


def _read_start(file: BinaryIO) -> bytes:
    """Read the first bytes, and leave the file where Pillow left it."""
    place = file.tell()
    file.seek(0)
    start = file.read(HEADER_BYTES)
    file.seek(place)
    return start


def _decode_with_pillow(image: Image.Image) -> Pixels:
    image.load()
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff_samples(image)
    # Alpha is dropped below; a palette's transparency would only make Pillow warn about it.
    image.info.pop("transparency", None)
    if image.mode.startswith("I;16"):
        deep = np.asarray(image).astype(np.uint16)
        if _is_inverted_tiff(image):
            deep = U16_MAX - deep
        return deep[:, :, None]
    if image.mode == "I":
        return _narrow_to_u16(np.asarray(image))[:, :, None]
    if image.mode in _GREY_MODES:
        return _as_array(image, "L")[:, :, None]
    if image.mode in _COLOUR_MODES:
        return _as_array(image, "RGB")
    if image.mode == "F":
        raise _RefusedError(
            "floating-point samples have no known range; convert the file to 8 or 16 bits"
        )
    raise _RefusedError(f"colour mode {image.mode} is not supported; convert the file to RGB")


def _as_array(image: Image.Image, mode: str) -> Pixels:
    # convert() would copy an image that has the mode already.
    return np.array(image if image.mode == mode else image.convert(mode))


def _check_tiff_samples(image: TiffImagePlugin.TiffImageFile) -> None:
    """Refuse TIFF samples that Pillow would silently cut to 8 bits or read with a wrong sign."""
    bits = max(_as_tuple(image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, 1)))
    if bits > 8 and image.mode in (*_GREY_MODES, *_COLOUR_MODES):
        raise _RefusedError(
            f"{bits}-bit colour TIFF cannot be decoded without loss; convert the file to PNG"
        )
    signed = 2 in _as_tuple(image.tag_v2.get(_TIFF_SAMPLE_FORMAT, 1))
    if signed and image.mode != "I":
        raise _RefusedError(f"signed {bits}-bit samples; convert the file to unsigned ones")


def _is_inverted_tiff(image: Image.Image) -> bool:
    """16-bit grey with white at 0, which Pillow leaves inverted."""
    return (
        isinstance(image, TiffImagePlugin.TiffImageFile)
        and image.tag_v2.get(_TIFF_PHOTOMETRIC) == 0
    )


def _narrow_to_u16(values: Pixels) -> Pixels:
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > U16_MAX:
        raise _RefusedError(
            f"32-bit samples must lie in 0..{U16_MAX}, got {low}..{high}; "
            "convert the file to 16 bits"
        )
    return values.astype(np.uint16)


def _as_tuple(value: object) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (int(str(value)),)


def _turn_upright(pixels: Pixels, orientation: object) -> Pixels:
    """Undo an EXIF orientation (1-8; anything else means none) of [h, w, c]."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _to_tensor(pixels: Pixels) -> Tensor:
    """[h, w, 1 or 3] to [3, h, w], pixel by pixel in memory: the layout that resizes fastest."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
    return tensor.expand(3, -1, -1)


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0]
