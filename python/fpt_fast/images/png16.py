"""PNG with 16 bits a sample and more than one channel, which Pillow would cut to 8 bits.

torchvision decodes it, but a damaged file makes its libpng binding crash the process.  So only
a file proven whole reaches it: chunk checksums right, the compressed data of exactly the
expected length with its own checksum right, every filter type known.
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torchvision.io import ImageReadMode, decode_png

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


def is_colour_png16(data: bytearray) -> bool:
    """Tell a PNG of 16-bit RGB, RGBA or grey with alpha by its header."""
    return (
        len(data) >= 33 and data.startswith(_SIGNATURE) and data[24] == 16 and data[25] in _CHANNELS
    )


def decode_colour_png16(data: bytearray) -> npt.NDArray[np.generic]:
    """Decode to [h, w, 1 or 3] u16, alpha dropped; ValueError or zlib.error where damaged."""
    header = b""
    packed = bytearray()
    for kind, body in _read_chunks(data):
        if kind == b"IHDR":
            header = body
        elif kind == b"IDAT":
            packed += body
    _check_stream(header, packed)
    whole = bytearray(_SIGNATURE)
    for kind, body in ((b"IHDR", header), (b"IDAT", bytes(packed)), (b"IEND", b"")):
        whole += struct.pack(">I", len(body)) + kind + body
        whole += struct.pack(">I", zlib.crc32(kind + body))
    decoded = decode_png(torch.frombuffer(whole, dtype=torch.uint8), mode=ImageReadMode.UNCHANGED)
    colours = 3 if decoded.shape[0] >= 3 else 1
    pixels: npt.NDArray[np.generic] = decoded[:colours].permute(1, 2, 0).numpy()
    return pixels


def _read_chunks(data: bytearray) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, body) up to IEND; checksums are checked where the picture depends on them."""
    offset = len(_SIGNATURE)
    while offset + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, offset)
        kind = bytes(data[offset + 4 : offset + 8])
        body = bytes(data[offset + 8 : offset + 8 + length])
        if kind == b"IEND":
            return
        if len(body) < length or offset + 12 + length > len(data):
            raise ValueError("truncated PNG")
        (checksum,) = struct.unpack_from(">I", data, offset + 8 + length)
        if kind in (b"IHDR", b"IDAT"):
            if zlib.crc32(kind + body) != checksum:
                raise ValueError(f"wrong checksum of PNG chunk {kind.decode()}")
            yield kind, body
        offset += 12 + length
    raise ValueError("truncated PNG")


def _check_stream(header: bytes, packed: bytearray) -> None:
    """Raise unless the compressed data unpack to exactly the scan lines that the header asks."""
    if len(header) != 13:
        raise ValueError("PNG header of wrong length")
    width, height, _, kind, compression, filtering, interlaced = struct.unpack(">IIBBBBB", header)
    if compression or filtering or interlaced > 1:
        raise ValueError("PNG header with unknown methods")
    pixel_bytes = 2 * _CHANNELS[kind]
    blocks = []  # (rows, bytes of a row with its filter type)
    for x, y, dx, dy in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // dx), -(-(height - y) // dy)
        if columns > 0 and rows > 0:
            blocks.append((rows, 1 + columns * pixel_bytes))
    expected = sum(rows * row_bytes for rows, row_bytes in blocks)
    unpacker = zlib.decompressobj()
    # The bound keeps a small file from unpacking to an endless one.
    lines = np.frombuffer(unpacker.decompress(bytes(packed), expected + 1), np.uint8)
    if lines.size != expected or not unpacker.eof:
        raise ValueError("PNG data do not fill the image")
    start = 0
    for rows, row_bytes in blocks:
        stop = start + rows * row_bytes
        if lines[start:stop:row_bytes].max() > 4:
            raise ValueError("unknown PNG filter type")
        start = stop
