"""PNG with 16 bits a sample and more than one channel, of which Pillow would keep 8 bits.

Unpacked by zlib, unfiltered by numpy.  (torchvision's decoder crashes the process on a damaged
PNG.)
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

HEADER_BYTES = 33
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {2: 3, 4: 2, 6: 4}
# Adam7: first column, first row, column step, row step of each pass.
_PASSES = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)

Bytes = npt.NDArray[np.uint8]
Signed = npt.NDArray[np.int16]  # u8 values with room for the sums of the filters


def is_colour_png16(start: bytes) -> bool:
    """Tell a PNG of 16-bit RGB, RGBA or grey with alpha by its first ``HEADER_BYTES``."""
    return (
        len(start) == HEADER_BYTES
        and start.startswith(_SIGNATURE)
        and start[24] == 16
        and start[25] in _CHANNELS
    )


def decode_colour_png16(data: bytearray) -> npt.NDArray[np.uint16]:
    """Decode to [h, w, 1 or 3] u16, alpha dropped; ValueError or zlib.error where damaged."""
    header = b""
    packed = bytearray()
    for kind, body in _read_chunks(data):
        if kind == b"IHDR":
            header = body
        elif kind == b"IDAT":
            packed += body
    if len(header) != 13:
        raise ValueError("PNG header of wrong length")
    width, height, _, kind, compression, filtering, interlaced = struct.unpack(">IIBBBBB", header)
    if compression or filtering or interlaced > 1:
        raise ValueError("PNG header with unknown methods")
    channels = _CHANNELS[kind]
    out = np.empty((height, width, 2 * channels), np.uint8)
    blocks = [out[y::dy, x::dx] for x, y, dx, dy in (_PASSES if interlaced else ((0, 0, 1, 1),))]
    lines = _unpack(packed, sum(_line_bytes(block) * block.shape[0] for block in blocks))
    start = 0
    for block in blocks:
        stop = start + _line_bytes(block) * block.shape[0]
        if stop > start:
            block[:] = _unfilter(lines[start:stop].reshape(block.shape[0], -1), block.shape[2])
        start = stop
    colours = 3 if channels >= 3 else 1
    return out.view(">u2")[:, :, :colours].astype(np.uint16)


def _line_bytes(block: Bytes) -> int:
    """Bytes of a scan line with its filter type; a pass without columns has no lines."""
    return 1 + block.shape[1] * block.shape[2] if block.shape[1] else 0


def _read_chunks(data: bytearray) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, body) up to IEND of the chunks that the picture depends on, checked."""
    offset = len(_SIGNATURE)
    while offset + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, offset)
        kind = bytes(data[offset + 4 : offset + 8])
        if kind == b"IEND":
            return
        if offset + 12 + length > len(data):
            break
        if kind in (b"IHDR", b"IDAT"):
            body = bytes(data[offset + 8 : offset + 8 + length])
            (checksum,) = struct.unpack_from(">I", data, offset + 8 + length)
            if zlib.crc32(kind + body) != checksum:
                raise ValueError(f"wrong checksum of PNG chunk {kind.decode()}")
            yield kind, body
        offset += 12 + length
    raise ValueError("truncated PNG")


def _unpack(packed: bytearray, expected: int) -> Bytes:
    unpacker = zlib.decompressobj()
    # The bound keeps a small file from unpacking to an endless one.
    lines = np.frombuffer(unpacker.decompress(bytes(packed), expected + 1), np.uint8)
    if lines.size != expected or not unpacker.eof:
        raise ValueError("PNG data do not fill the image")
    return lines


def _unfilter(lines: Bytes, pixel_bytes: int) -> Bytes:
    """Undo the filters of scan lines [h, 1 + w * pixel_bytes]: [h, w, pixel_bytes].

    A pixel needs those to its left, above, and above left: all pixels of an antidiagonal can be
    done at once, from the two antidiagonals before it.
    """
    filters = lines[:, :1].astype(np.int16)  # [h, 1]
    if filters.max() > 4:
        raise ValueError("unknown PNG filter type")
    height = lines.shape[0]
    width = (lines.shape[1] - 1) // pixel_bytes
    diagonals = height + width - 1
    padded = np.zeros((height, width + height, pixel_bytes), np.uint8)
    padded[:, :width] = lines[:, 1:].reshape(height, width, pixel_bytes)
    # Read with rows one pixel shorter, row r is shifted right by r: columns are antidiagonals.
    skewed = padded.reshape(-1, pixel_bytes)[: height * diagonals]
    values = skewed.reshape(height, diagonals, pixel_bytes).swapaxes(0, 1).copy()
    # Row r stands at r + 1, below a border of zeros; rows not yet begun are the border at left.
    before, last, now = (np.zeros((height + 1, pixel_bytes), np.int16) for _ in range(3))
    for diagonal in range(diagonals):
        low, high = max(0, diagonal - width + 1), min(height, diagonal + 1)
        predicted = _predict(
            filters[low:high], last[low + 1 : high + 1], last[low:high], before[low:high]
        )
        now[low + 1 : high + 1] = (values[diagonal, low:high] + predicted) & 0xFF
        values[diagonal, low:high] = now[low + 1 : high + 1]
        before, last, now = last, now, before
    padded.reshape(-1, pixel_bytes)[: height * diagonals] = values.swapaxes(0, 1).reshape(
        -1, pixel_bytes
    )
    return padded[:, :width]


def _predict(filters: Signed, left: Signed, above: Signed, corner: Signed) -> Signed:
    """The prediction by filter type: none, sub, up, average, Paeth."""
    from_above, from_left = above - corner, left - corner
    to_left, to_above = np.abs(from_above), np.abs(from_left)
    to_corner = np.abs(from_above + from_left)
    paeth = np.where(to_above <= to_corner, above, corner)
    paeth = np.where((to_left <= to_above) & (to_left <= to_corner), left, paeth)
    simple = np.where(filters == 1, left, np.where(filters == 2, above, 0))
    average = np.where(filters == 3, (left + above) >> 1, simple)
    chosen: Signed = np.where(filters == 4, paeth, average)
    return chosen
