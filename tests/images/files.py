"""Image files that no library at hand writes: uncompressed TIFF of any samples, 16-bit PNG."""

import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, CIELAB = 0, 1, 2, 8


def write_tiff(
    path: Path,
    pixels: npt.NDArray[np.generic],
    photometric: int,
    sample_format: int = UNSIGNED,
) -> Path:
    """One strip, little-endian; ``pixels`` [h, w, c]."""
    height, width, samples = pixels.shape
    data = np.ascontiguousarray(pixels).astype(pixels.dtype.newbyteorder("<")).tobytes()
    bits = struct.pack(f"<{samples}H", *[8 * pixels.itemsize] * samples)
    formats = struct.pack(f"<{samples}H", *[sample_format] * samples)
    extra = 8 + 2 + 12 * 10 + 4
    entries = [
        (256, 4, 1, struct.pack("<I", width)),
        (257, 4, 1, struct.pack("<I", height)),
        (258, 3, samples, bits),
        (259, 3, 1, struct.pack("<HH", 1, 0)),
        (262, 3, 1, struct.pack("<HH", photometric, 0)),
        (273, 4, 1, struct.pack("<I", extra + len(bits) + len(formats))),
        (277, 3, 1, struct.pack("<HH", samples, 0)),
        (278, 4, 1, struct.pack("<I", height)),
        (279, 4, 1, struct.pack("<I", len(data))),
        (339, 3, samples, formats),
    ]
    out = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    tail = b""
    for tag, kind, count, value in entries:
        if len(value) > 4:
            value, tail = struct.pack("<I", extra + len(tail)), tail + value
        out += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    # Values that fit their entry leave a gap here, which the fixed data offset counts on.
    out += struct.pack("<I", 0) + tail.ljust(len(bits) + len(formats), b"\0")
    path.write_bytes(out + data)
    return path


def png16(pixels: npt.NDArray[np.uint16], *, interlaced: bool = False) -> bytes:
    """A PNG of [h, w, 1 to 4] with 16 bits a sample; rows use the five filters in turn."""
    height, width, samples = pixels.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[samples]
    header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, int(interlaced))
    passes = ADAM7 if interlaced else ((0, 0, 1, 1),)
    lines = b"".join(_png_lines(pixels[y::dy, x::dx]) for x, y, dx, dy in passes)
    return png_file([(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")])


def png_file(chunks: list[tuple[bytes, bytes]]) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for kind, body in chunks:
        out += struct.pack(">I", len(body)) + kind + body
        out += struct.pack(">I", zlib.crc32(kind + body))
    return out


def _png_lines(block: npt.NDArray[np.uint16]) -> bytes:
    if block.size == 0:
        return b""
    step = 2 * block.shape[2]
    above = [0] * (step * block.shape[1])
    lines = b""
    for number, row in enumerate(block):
        line = list(row.astype(">u2").tobytes())
        left = [0] * step + line[:-step]
        corner = [0] * step + above[:-step]
        predicted = [
            _png_prediction(number % 5, *bytes_) for bytes_ in zip(left, above, corner, strict=True)
        ]
        lines += bytes([number % 5])
        lines += bytes((x - p) % 256 for x, p in zip(line, predicted, strict=True))
        above = line
    return lines


def _png_prediction(kind: int, left: int, above: int, corner: int) -> int:
    """The five filters as the PNG specification words them."""
    estimate = left + above - corner
    paeth = min((left, above, corner), key=lambda value: abs(estimate - value))
    return (0, left, above, (left + above) // 2, paeth)[kind]
