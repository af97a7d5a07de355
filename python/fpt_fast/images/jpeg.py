"""Grey and RGB JPEG, with a check that nothing is missing.

libjpeg only warns when the data of a scan run out, or a scan never comes, and fills in mid-grey
or a blur; torchvision and Pillow drop the warning.  Here such a file is an error.
"""

import io
import re
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

# torchvision decodes twice as fast as Pillow, to the same pixels, but means to drop its decoders.
try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

Pixels = npt.NDArray[np.generic]

_MARKER = re.compile(rb"\xff+([^\x00\xff])")
_MARKER_AFTER_DATA = re.compile(rb"\xff+([^\x00\xd0-\xd7\xff])")
_START_OF_FRAME = (0xC0, 0xC1, 0xC2)
_PROGRESSIVE = 0xC2
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = 0xD9
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD9))
_COEFFICIENTS = 64
_MISSING = 255


@dataclass(slots=True)
class _Scans:
    """What the scans of a file deliver.

    ``low_bit`` is, by component, the lowest bit that has come of each of its 64 coefficients
    (0: all of it); ``data_start`` is where the last scan's entropy-coded data begin.
    """

    progressive: bool = False
    count: int = 0
    data_start: int = 0
    low_bit: dict[int, list[int]] = field(default_factory=dict)


def decode_whole_jpeg(data: bytearray, *, grey: bool) -> Pixels:
    """Decode to [h, w, 1 or 3] u8; ValueError, OSError or RuntimeError where damaged or cut."""
    pixels = _decode(data, grey)
    scans = _read_scans(data)
    if any(any(bits) for bits in scans.low_bit.values()):
        raise ValueError("the JPEG lacks scans that its header announces")
    # A sequential image that was cut ends in exact mid-grey; other kinds do not show it.
    suspicious = scans.progressive or scans.count > 1 or bool((pixels[-1, -1] == 128).all())
    if suspicious and _wants_more_data(data, scans.data_start, pixels):
        raise ValueError("the JPEG data end before the image does")
    return pixels


def _decode(data: bytearray, grey: bool) -> Pixels:
    if decode_jpeg is None:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            decoded = np.array(image)
        return decoded[:, :, None] if decoded.ndim == 2 else decoded
    mode = ImageReadMode.GRAY if grey else ImageReadMode.RGB
    tensor = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), mode=mode)
    pixels: Pixels = tensor.permute(1, 2, 0).numpy()
    return pixels


def _wants_more_data(data: bytearray, start: int, pixels: Pixels) -> bool:
    """Tell whether the decoder ran out of the entropy-coded data that begin at ``start``.

    It did if bytes added at their end change the picture.
    """
    found = _MARKER_AFTER_DATA.search(data, start)
    end = len(data) if found is None else found.start()
    filler = bytes((7 * i + 37) % 251 for i in range(256))
    longer = data[:end] + filler + data[end:]
    return not np.array_equal(_decode(longer, pixels.shape[2] == 1), pixels)


def _read_scans(data: bytearray) -> _Scans:
    """Walk the markers of a file that libjpeg has accepted, past bytes that it passes over."""
    scans = _Scans()
    found = _MARKER.search(data, 2)
    while found is not None and found[1][0] != _END_OF_IMAGE:
        marker, offset = found[1][0], found.end()
        if marker in _WITHOUT_LENGTH:
            found = _MARKER.search(data, offset)
            continue
        stop = offset + int.from_bytes(data[offset : offset + 2])
        segment = data[offset + 2 : stop]
        if marker in _START_OF_FRAME:
            scans.progressive = marker == _PROGRESSIVE
            # Depth, height and width come first; three bytes a component, its name the first.
            scans.low_bit = {name: [_MISSING] * _COEFFICIENTS for name in segment[6::3]}
        if marker == _START_OF_SCAN:
            if not scans.low_bit:
                raise ValueError("only Huffman-coded JPEG of 8 bits is supported")
            _note_scan(scans, segment)
            scans.data_start = stop
            if not scans.progressive and segment[0] == len(scans.low_bit):
                break  # the only scan of a sequential image: spare the search through its data
            found = _MARKER_AFTER_DATA.search(data, stop)
        else:
            found = _MARKER.search(data, stop)
    return scans


def _note_scan(scans: _Scans, segment: bytearray) -> None:
    components = segment[0]
    first, last, bits = segment[1 + 2 * components : 4 + 2 * components]
    if not scans.progressive:
        # A sequential scan brings all of its components, whatever these fields say.
        first, last, bits = 0, _COEFFICIENTS - 1, 0
    scans.count += 1
    for name in segment[1 : 1 + 2 * components : 2]:
        for k in range(first, min(last, _COEFFICIENTS - 1) + 1):
            scans.low_bit[name][k] = bits & 0x0F
