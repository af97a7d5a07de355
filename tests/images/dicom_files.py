"""DICOM files that the tests make: known stored values, known ways to display them."""

import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    generate_uid,
)

Pixels = npt.NDArray[np.generic]


def ramp(bits: int, *, signed: bool = False, shape: tuple[int, int] = (64, 80)) -> Pixels:
    """From the lowest to the highest value that ``bits`` can hold."""
    low = -(1 << (bits - 1)) if signed else 0
    values = np.linspace(low, low + (1 << bits) - 1, shape[0] * shape[1]).round()
    kind = "i" if signed else "u"
    return values.astype(f"{kind}{1 if bits <= 8 else 2}").reshape(shape)


def dicom(pixels: Pixels, bits: int, **elements: Any) -> FileDataset:
    """A data set with ``pixels`` [h, w] or [frames, h, w] (colour: [h, w, 3]) and ``elements``."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalMammographyXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    colour = pixels.ndim == 3 and pixels.shape[-1] == 3
    data.SOPClassUID, data.SOPInstanceUID = (
        meta.MediaStorageSOPClassUID,
        meta.MediaStorageSOPInstanceUID,
    )
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    data.Rows, data.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    if pixels.ndim == 3 and not colour:
        data.NumberOfFrames = len(pixels)
    data.BitsAllocated, data.BitsStored, data.HighBit = 8 * pixels.itemsize, bits, bits - 1
    data.PixelRepresentation = int(pixels.dtype.kind == "i")
    data.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def lut(values: list[int], first: int, depth: int) -> list[Dataset]:
    """A modality or VOI LUT sequence of one item."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values) % 65536, first, depth])
    item.add_new("LUTData", "OW", np.array(values, "<u2").tobytes())
    item.ModalityLUTType = "US"
    return [item]


def save(path: Path, data: FileDataset) -> Path:
    data.save_as(path, enforce_file_format=True)
    return path


def as_jpeg(data: FileDataset) -> FileDataset:
    """The same image as baseline JPEG."""
    out = BytesIO()
    Image.fromarray(data.pixel_array).save(out, "JPEG", quality=95)
    data.PixelData = encapsulate([out.getvalue()])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return data


def as_lossless_jpeg(data: FileDataset, syntax: str) -> FileDataset:
    """The same grey image as lossless JPEG (ITU-T T.81 annex H), predicted from the left."""
    rows = data.pixel_array.astype(int)
    precision = int(data.BitsStored)
    predicted = np.empty_like(rows)
    predicted[:, 1:] = rows[:, :-1]
    predicted[1:, 0] = rows[:-1, 0]
    predicted[0, 0] = 1 << (precision - 1)
    bits = "".join(_difference(int(value)) for value in (rows - predicted).ravel())
    bits += "1" * (-len(bits) % 8)
    coded = int(bits, 2).to_bytes(len(bits) // 8).replace(b"\xff", b"\xff\x00")
    height, width = rows.shape
    frame = struct.pack(">BHHBBBB", precision, height, width, 1, 1, 0x11, 0)
    table = bytes([0, *([0] * 4), 17, *([0] * 11), *range(17)])  # all codes of five bits
    parts = [(0xC3, frame), (0xC4, table), (0xDA, bytes([1, 1, 0, 1, 0, 0]))]
    out = b"\xff\xd8"
    for marker, body in parts:
        out += struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body
    data.PixelData = encapsulate([out + coded + b"\xff\xd9"])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = UID(syntax)
    return data


def _difference(value: int) -> str:
    size = abs(value).bit_length()
    code = f"{size:05b}"
    return (
        code if size == 0 else code + f"{value if value > 0 else value - 1 + (1 << size):0{size}b}"
    )
