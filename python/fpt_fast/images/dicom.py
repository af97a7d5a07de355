"""DICOM files to pixels: modality LUT, window or VOI LUT, MONOCHROME1 inverted.

Every step acts on a level, not on a place: the whole pipeline is a table of the (at most 65,536)
levels that the file's bits can hold, made once a file, through which its pixels are read.  Values
are pydicom's own, scaled to 16 bits.
"""

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fpt_fast.images import jpeg_plugin
from fpt_fast.images.windows import (
    U16_MAX,
    Values,
    parse_window,
    stretch,
    to_u16,
)
from fpt_fast.records import Reading

Pixels = npt.NDArray[np.generic]
Dataset = Any  # pydicom's, which is there with the extra `dicom` only

EXTENSIONS = (".dcm", ".dicom")
MAGIC_BYTES = 132
_MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
_MOST_BITS = 16
_DISPLAY = (
    *("BitsStored", "PixelRepresentation", "PhotometricInterpretation"),
    *("RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("WindowCenter", "WindowWidth", "VOILUTFunction", "VOILUTSequence"),
)
_JPEG = "1.2.840.10008.1.2.4."
_PILLOW = (_JPEG + "50", _JPEG + "51")  # baseline, extended
_LOSSLESS = (_JPEG + "57", _JPEG + "70")
_PLUGINS = {
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
    **dict.fromkeys((_JPEG + "80", _JPEG + "81"), "pyjpegls"),
    # JPEG 2000 and its high-throughput form, by OpenJPEG
    **dict.fromkeys([_JPEG + number for number in ("90", "91", "201", "202", "203")], "pylibjpeg"),
}
# Where a multi-frame file of the newer kind keeps what belongs to all frames or to each.
_GROUPS = ("PixelValueTransformationSequence", "FrameVOILUTSequence")


class DicomRefused(ValueError):
    """A DICOM file that cannot be read rightly; the reason is fit for the reader."""


def is_dicom(start: bytes, name: str) -> bool:
    """Tell a DICOM file by its first ``MAGIC_BYTES``, or by its ending where it has no preamble."""
    return has_mark(start) or Path(name).suffix.lower() in EXTENSIONS


def has_mark(start: bytes) -> bool:
    """Whether the first ``MAGIC_BYTES`` of a file have DICOM's mark, which old files may lack."""
    return start[128:132] == b"DICM"


def has_dicom_name(path: Path) -> bool:
    """Tell what is likely DICOM by its name: its ending, or that it has none but a number."""
    return path.suffix.lower() in EXTENSIONS or not path.suffix or path.suffix[1:].isdigit()


def decode_dicom(file: BinaryIO, reading: Reading, max_pixels: int | None) -> Pixels:
    """Decode an open file to [h, w, 1 or 3] u8 or u16.

    Grey of up to 16 bits goes through its modality LUT, then through the window of ``reading``;
    colour (RGB, YBR, palette) becomes RGB.  u8 where the file has exactly 8 bits and no window
    changes them, else u16.  Raises ``DicomRefused``, with a reason for the reader.
    """
    pydicom = _import_pydicom()
    try:
        return _decode(pydicom.dcmread(file, force=True), reading, max_pixels)
    except DicomRefused:
        raise
    # A damaged file can lead pydicom and its plug-ins anywhere.
    except Exception as error:
        raise DicomRefused(f"damaged or unsupported DICOM ({_first_line(error)})") from error


def _decode(data: Dataset, reading: Reading, max_pixels: int | None) -> Pixels:
    _check_header(data, max_pixels)
    frame = _choose_frame(data, reading.frame)
    stored = _decode_frame(data, frame)
    interpretation = str(data.PhotometricInterpretation)
    if interpretation in _MONOCHROME:
        return _display(stored, _display_settings(data, frame), reading.window)[:, :, None]
    if parse_window(reading.window) is not None or reading.window == "minmax":
        raise DicomRefused(
            f"{interpretation} is colour, which has no window; got --window {reading.window}: use "
            "file or full"
        )
    if interpretation == "PALETTE COLOR":
        from pydicom.pixels.processing import apply_color_lut

        stored = apply_color_lut(stored, data)
        return _full_scale_colour(stored, 8 * stored.itemsize)
    return _full_scale_colour(stored, int(data.BitsStored))


def _import_pydicom() -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise DicomRefused("a DICOM file needs pydicom: pip install 'fpt-fast[dicom]'") from error
    return pydicom


def _check_header(data: Dataset, max_pixels: int | None) -> None:
    """Refuse what has no pixels, or pixels of which the meaning is not known."""
    missing = [name for name in ("Rows", "Columns", "BitsStored") if data.get(name) is None]
    if missing or "PixelData" not in data:
        float_data = [name for name in ("FloatPixelData", "DoubleFloatPixelData") if name in data]
        if float_data:
            raise DicomRefused(f"{float_data[0]} (floating point) has no known range")
        lacking = ", ".join(missing or ["PixelData"])
        raise DicomRefused(
            f"not a DICOM image: it has no {lacking} (a report, a directory, a file cut short, or "
            "no DICOM at all)"
        )
    rows, columns = int(data.Rows), int(data.Columns)
    if max_pixels is not None and rows * columns > max_pixels:
        raise DicomRefused(f"{columns} x {rows} pixels are more than {max_pixels} allowed")
    if not 1 <= int(data.BitsStored) <= _MOST_BITS:
        raise DicomRefused(f"{data.BitsStored} bits a sample; up to {_MOST_BITS} are supported")


def _choose_frame(data: Dataset, wanted: int | None) -> int:
    """The frame to read, from 0; ``wanted`` counts from 1."""
    frames = int(data.get("NumberOfFrames") or 1)
    if wanted is None:
        if frames != 1:
            raise DicomRefused(f"it has {frames} frames; choose one with --dicom-frame (from 1)")
        return 0
    if not 1 <= wanted <= frames:
        raise DicomRefused(f"it has {frames} frame{'s'[: frames > 1]}, got --dicom-frame {wanted}")
    return wanted - 1


def _decode_frame(data: Dataset, frame: int) -> Pixels:
    """The stored values of one frame, [h, w] or [h, w, 3]; YBR becomes RGB."""
    from pydicom.pixels.utils import pixel_array

    syntax = data.file_meta.get("TransferSyntaxUID")
    if syntax is None:
        # A file without a preamble says nowhere how it is written; pydicom found out.
        from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

        implicit = data.original_encoding[0]
        syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
        data.file_meta.TransferSyntaxUID = syntax
    plugin = _plugin(str(syntax), int(data.BitsStored))
    try:
        stored: Pixels = pixel_array(data, index=frame, decoding_plugin=plugin)
    except Exception as error:
        if not plugin:
            raise
        raise DicomRefused(
            f"{syntax.name} could not be decoded: it is damaged, or its plug-in is missing "
            f"(pip install 'fpt-fast[dicom]'): {_first_line(error)}"
        ) from error
    expected = (int(data.Rows), int(data.Columns))
    if stored.shape[:2] != expected:
        raise DicomRefused(f"header says {expected} pixels, data {stored.shape[:2]}")
    return stored


def _plugin(syntax: str, bits: int) -> str:
    """pydicom's plug-in for a transfer syntax: one each, of a permissive licence; "" for its own.

    Left to itself pydicom tries all that are there: GDCM, which ends the process on some damaged
    files, and GPL code if it was installed.
    """
    if syntax in _PILLOW and bits <= 8:
        return "pillow"
    if syntax in _PILLOW or syntax in _LOSSLESS:
        jpeg_plugin.register()
        return jpeg_plugin.LABEL
    return _PLUGINS.get(syntax, "")


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    # pydicom lists what its plug-ins said below a line that says nothing.
    return lines[1].strip() if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def _display_settings(data: Dataset, frame: int) -> Dataset:
    """What turns stored values into grey: of the file, of all its frames, or of the frame."""
    from pydicom.dataset import Dataset as NewDataset

    found = NewDataset()
    # pydicom asks it for the order of the bytes of a LUT.
    found.file_meta = data.file_meta
    sources = [data]
    for groups in (data.get("SharedFunctionalGroupsSequence"), _own_groups(data, frame)):
        for group in groups or ():
            sources += [item for name in _GROUPS for item in group.get(name) or ()]
    for source in sources:
        for name in _DISPLAY:
            if name in source:
                found[name] = source[name]
    return found


def _own_groups(data: Dataset, frame: int) -> list[Dataset]:
    groups = data.get("PerFrameFunctionalGroupsSequence") or ()
    return [groups[frame]] if frame < len(groups) else []


def _display(stored: Pixels, settings: Dataset, window: str) -> Pixels:
    """Stored grey values [h, w] to u8 or u16 [h, w], black at 0."""
    bits, signed = int(settings.BitsStored), int(settings.PixelRepresentation) == 1
    lowest = -(1 << (bits - 1)) if signed else 0
    index = stored.astype(np.int32) - lowest
    if int(index.min()) < 0 or int(index.max()) >= 1 << bits:
        low, high = int(stored.min()), int(stored.max())
        raise DicomRefused(f"levels {low}..{high} are not of the {bits} bits that it declares")
    levels = np.arange(lowest, lowest + (1 << bits), dtype=np.int64)
    inverted = str(settings.PhotometricInterpretation) == "MONOCHROME1"
    if bits == 8 and not signed and window in ("file", "full") and _is_plain(settings, window):
        table8 = levels.astype(np.uint8)
        return (255 - table8 if inverted else table8)[index]
    from pydicom.pixels.processing import apply_modality_lut

    values = np.asarray(apply_modality_lut(levels, settings))
    table = to_u16(_shares(values, index, settings, window))
    return (U16_MAX - table if inverted else table)[index]


def _is_plain(settings: Dataset, window: str) -> bool:
    """Tell whether stored values are the grey levels already, up to a linear map of the range."""
    if settings.get("ModalityLUTSequence") or float(settings.get("RescaleSlope") or 1) < 0:
        return False
    return window == "full" or not (settings.get("VOILUTSequence") or _has_window(settings))


def _has_window(settings: Dataset) -> bool:
    return all(settings.get(name) not in (None, "") for name in ("WindowCenter", "WindowWidth"))


def _shares(
    values: npt.NDArray[Any], index: npt.NDArray[np.int32], settings: Dataset, window: str
) -> Values:
    """Levels after the modality LUT to [0, 1], by ``window``.

    pydicom gives a windowed level on the scale of the file's range; here it is a share of it.
    """
    levels = values.astype(np.float64)
    given = parse_window(window)
    if given is not None:
        # Through pydicom too, as if it were the file's: not even a tie is rounded otherwise.
        settings.WindowCenter, settings.WindowWidth = given
        settings.VOILUTFunction = "LINEAR"
    if window == "minmax":
        present = np.zeros(len(levels), dtype=bool)
        present[index.ravel()] = True
        low, high = float(levels[present].min()), float(levels[present].max())
        return stretch(levels.clip(low, high), low, high)
    if window == "file" and settings.get("VOILUTSequence"):
        return _look_up(values, settings)
    low, high = _declared_range(settings)
    if given is not None or (window == "file" and _has_window(settings)):
        from pydicom.pixels.processing import apply_windowing

        return stretch(np.asarray(apply_windowing(levels, settings)), low, high)
    return stretch(levels, low, high) if low < high else stretch(levels, high, low)


def _declared_range(settings: Dataset) -> tuple[float, float]:
    """What the file's lowest and highest level become by the modality LUT, as pydicom has it."""
    if settings.get("ModalityLUTSequence"):
        depth = int(settings.ModalityLUTSequence[0].LUTDescriptor[2])
        return 0.0, float((1 << depth) - 1)
    bits, signed = int(settings.BitsStored), int(settings.PixelRepresentation) == 1
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    if "RescaleSlope" in settings and "RescaleIntercept" in settings:
        slope, intercept = float(settings.RescaleSlope), float(settings.RescaleIntercept)
        if slope == 0.0 or not (math.isfinite(slope) and math.isfinite(intercept)):
            raise DicomRefused(f"rescale slope {slope} and intercept {intercept} make no image")
        return low * slope + intercept, high * slope + intercept
    return float(low), float(high)


def _look_up(values: npt.NDArray[Any], settings: Dataset) -> Values:
    """The (first) VOI LUT (PS3.3 C.11.2.1.1), as shares of its depth.

    pydicom's own ``apply_voi`` counts entries in the LUT's depth: with entries of 8 bits for
    levels of 12 they wrap around.
    """
    lut = settings.VOILUTSequence[0]
    entries, first, depth = (int(number) for number in lut.LUTDescriptor)
    entries = entries or 1 << 16
    data = lut.LUTData
    if isinstance(data, bytes):
        order = "<" if settings.file_meta.TransferSyntaxUID.is_little_endian else ">"
        data = np.frombuffer(data[: 2 * entries], f"{order}u2")
    table = np.asarray(data, dtype=np.float64)
    if len(table) < entries or not 1 <= depth <= _MOST_BITS or table.max() >= 1 << depth:
        raise DicomRefused(f"its VOI LUT does not hold {entries} entries of {depth} bits")
    place = np.clip(values.astype(np.int64) - first, 0, entries - 1)
    return table[place] / ((1 << depth) - 1)


def _full_scale_colour(pixels: Pixels, bits: int) -> Pixels:
    """Colour [h, w, 3] of ``bits`` a sample on the scale of u8 or u16."""
    if bits == 8:
        return pixels.astype(np.uint8)
    top = (1 << bits) - 1
    if int(pixels.max()) > top:
        raise DicomRefused(f"levels up to {int(pixels.max())} are not of {bits} bits")
    return to_u16(pixels.astype(np.float64) / top)
