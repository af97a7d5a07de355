"""JPEG that Pillow cannot read in DICOM files, lossless (ITU-T T.81 annex H) and of 12 bits, as a
plug-in of pydicom on imagecodecs (BSD).

The decoders take a frame's own header at its word: here it must first be that of the file.
"""

import importlib.util
from functools import cache
from typing import Any

import numpy as np

LABEL = "imagecodecs"
_EXTENDED, _LOSSLESS, _LOSSLESS_SV1 = (f"1.2.840.10008.1.2.4.{number}" for number in (51, 57, 70))
# pydicom names these where the plug-in cannot run.
DECODER_DEPENDENCIES = dict.fromkeys((_EXTENDED, _LOSSLESS, _LOSSLESS_SV1), ("imagecodecs",))
# Frame headers by what they announce, and the markers that no length follows.
_OF_EXTENDED, _OF_LOSSLESS = {0xC0, 0xC1}, {0xC3}
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_BARE = {0x01, *range(0xD0, 0xD9)}


@cache
def register() -> None:
    """Make the plug-in known to pydicom."""
    from pydicom.pixels.decoders.base import get_decoder

    for syntax in DECODER_DEPENDENCIES:
        get_decoder(syntax).add_plugin(LABEL, (__name__, "decode_frame"))


def is_available(uid: str) -> bool:
    """Tell pydicom whether frames of that transfer syntax can be decoded here."""
    return uid in DECODER_DEPENDENCIES and importlib.util.find_spec("imagecodecs") is not None


def decode_frame(frame: bytes, runner: Any) -> bytes:
    """The samples of one frame in the container that ``runner``, pydicom's, asks for."""
    import imagecodecs

    lossless = str(runner.transfer_syntax) != _EXTENDED
    precision, *shape = _read_header(frame, _OF_LOSSLESS if lossless else _OF_EXTENDED)
    expected = [runner.rows, runner.columns, runner.samples_per_pixel]
    if shape != expected or precision > runner.bits_allocated:
        raise ValueError(
            f"the frame has {shape} rows, columns and samples of {precision} bits, its file says "
            f"{expected} and {runner.bits_allocated}"
        )
    decode = imagecodecs.jpegsof3_decode if lossless else imagecodecs.jpeg8_decode
    samples = np.asarray(decode(frame))
    if samples.size != np.prod(expected):
        raise ValueError(f"the frame became {samples.shape} samples, not {expected}")
    runner.set_option("planar_configuration", 0)
    bits = int(runner.bits_allocated)
    if runner.pixel_representation == 1:
        # The sign is the highest bit of the precision.
        spare = 16 - precision
        signed = (samples.astype(np.uint16) << spare).view(np.int16) >> spare
        return signed.astype(f"<i{bits // 8}").tobytes()
    return samples.astype(f"<u{bits // 8}").tobytes()


def _read_header(frame: bytes, wanted: set[int]) -> tuple[int, int, int, int]:
    """Precision, rows, columns and samples that the frame header says."""
    place = 0
    while place + 4 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == 0xFF or marker in _BARE:
            place += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAMES:
            if marker not in wanted or place + 10 > len(frame):
                raise ValueError(f"a frame of JPEG process SOF{marker - 0xC0} is not what it says")
            rows = int.from_bytes(frame[place + 5 : place + 7], "big")
            columns = int.from_bytes(frame[place + 7 : place + 9], "big")
            return frame[place + 4], rows, columns, frame[place + 9]
        place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    raise ValueError("the frame has no JPEG frame header")
