"""DICOM: our pixels against pydicom's own pipeline, and what must be refused."""

import builtins
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import torch
from images.dicom_files import Pixels, as_jpeg, as_lossless_jpeg, dicom, lut, ramp, save
from pydicom import dcmread
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from fpt_fast.images import ImageError, list_images, load_image_set, read_image
from fpt_fast.records import AS_THE_FILE_SAYS, Reading


def grey(path: Path, reading: Reading = AS_THE_FILE_SAYS) -> Pixels:
    """What read_image gives of a grey file, [h, w]."""
    image = read_image(path, reading)
    assert image.stride(0) == 0 and image.dtype in (torch.uint8, torch.uint16)
    return image[0].numpy()


def pydicom_says(data: FileDataset, low: float, high: float) -> Pixels:
    """pydicom's own pipeline, its range ``low`` to ``high`` spread over 16 bits."""
    values = apply_voi_lut(apply_modality_lut(data.pixel_array, data), data).astype(np.float64)
    levels = np.rint((values - low) / (high - low) * 65535).astype(np.uint16)
    return 65535 - levels if data.PhotometricInterpretation == "MONOCHROME1" else levels


RESCALE = {"RescaleSlope": 2.5, "RescaleIntercept": -1024.0}
CASES: dict[str, tuple[int, bool, dict[str, Any], tuple[float, float]]] = {
    "12 bits": (12, False, {}, (0, 4095)),
    "16 bits": (16, False, {}, (0, 65535)),
    "16 bits signed": (16, True, {}, (-32768, 32767)),
    "10 bits, inverted": (10, False, {"PhotometricInterpretation": "MONOCHROME1"}, (0, 1023)),
    "window": (12, False, {"WindowCenter": 1500, "WindowWidth": 900}, (0, 4095)),
    "window, inverted": (
        12,
        False,
        {"WindowCenter": 1500, "WindowWidth": 900, "PhotometricInterpretation": "MONOCHROME1"},
        (0, 4095),
    ),
    "window of width 1": (12, False, {"WindowCenter": 1500, "WindowWidth": 1}, (0, 4095)),
    "several windows": (12, False, {"WindowCenter": [800, 9], "WindowWidth": [99, 5]}, (0, 4095)),
    "exact window": (
        12,
        False,
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "LINEAR_EXACT"},
        (0, 4095),
    ),
    "sigmoid": (
        12,
        False,
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"},
        (0, 4095),
    ),
    "rescaled": (12, False, RESCALE, (-1024, 4095 * 2.5 - 1024)),
    "CT window": (
        16,
        True,
        {"RescaleSlope": 1, "RescaleIntercept": -1024, "WindowCenter": 40, "WindowWidth": 400},
        (-32768 - 1024, 32767 - 1024),
    ),
    "modality LUT": (
        8,
        False,
        {"ModalityLUTSequence": lut([255 - i for i in range(250)], 3, 8)},
        (0, 255),
    ),
    "VOI LUT": (
        12,
        False,
        {"VOILUTSequence": lut([(i * i) >> 8 for i in range(4000)], 50, 16)},
        (0, 65535),
    ),
    "VOI LUT before window": (
        12,
        False,
        {
            "VOILUTSequence": lut([i // 2 for i in range(4096)], 0, 12),
            "WindowCenter": 5,
            "WindowWidth": 3,
        },
        (0, 4095),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_levels_are_those_of_pydicom(tmp_path: Path, name: str) -> None:
    bits, signed, elements, levels = CASES[name]
    path = save(tmp_path / "x.dcm", dicom(ramp(bits, signed=signed), bits, **elements))
    expected = pydicom_says(dcmread(path), *levels)
    assert expected.min() == 0 or name == "sigmoid" or "LUT" in name
    np.testing.assert_array_equal(grey(path), expected)


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_every_level_of_a_ramp_survives_its_full_range(tmp_path: Path, bits: int) -> None:
    pixels = np.arange(1 << bits, dtype=np.uint16).reshape(32, -1)
    out = grey(save(tmp_path / "x.dcm", dicom(pixels, bits)))
    assert len(np.unique(out)) == 1 << bits
    assert (out.min(), out.max()) == (0, 65535)
    assert (np.diff(out.ravel().astype(int)) > 0).all()
    if bits == 16:
        np.testing.assert_array_equal(out, pixels)


@pytest.mark.parametrize("inverted", [False, True])
def test_eight_bits_stay_as_they_are(tmp_path: Path, inverted: bool) -> None:
    pixels = ramp(8)
    elements = {"PhotometricInterpretation": "MONOCHROME1"} if inverted else {}
    out = grey(save(tmp_path / "x.dcm", dicom(pixels, 8, **elements)))
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, 255 - pixels if inverted else pixels)


@pytest.mark.parametrize("elements", [{}, {"WindowCenter": 7, "WindowWidth": 3}, RESCALE])
def test_a_given_window_replaces_that_of_the_file(tmp_path: Path, elements: dict[str, Any]) -> None:
    path = save(tmp_path / "x.dcm", dicom(ramp(12), 12, **elements))
    data = dcmread(path)
    data.WindowCenter, data.WindowWidth = -200.0, 900.5
    values = apply_windowing(apply_modality_lut(data.pixel_array, data), data)
    low, high = (-1024, 4095 * 2.5 - 1024) if elements is RESCALE else (0, 4095)
    expected = np.rint((values - low) / (high - low) * 65535)
    np.testing.assert_array_equal(grey(path, Reading(window="-200/900.5")), expected)


def test_full_keeps_what_a_window_of_the_file_would_cut(tmp_path: Path) -> None:
    pixels = ramp(12)
    path = save(tmp_path / "x.dcm", dicom(pixels, 12, WindowCenter=100, WindowWidth=50))
    assert len(np.unique(grey(path))) <= 51
    full = grey(path, Reading(window="full"))
    assert len(np.unique(full)) == len(np.unique(pixels))


def test_minmax_spreads_what_there_is(tmp_path: Path) -> None:
    pixels = ramp(10) + np.uint16(1000)
    path = save(tmp_path / "x.dcm", dicom(pixels, 12, WindowCenter=100, WindowWidth=50))
    out = grey(path, Reading(window="minmax"))
    assert (out.min(), out.max()) == (0, 65535)
    np.testing.assert_array_equal(out, np.rint((pixels - 1000.0) / 1023 * 65535))
    flat = save(tmp_path / "flat.dcm", dicom(np.full((4, 4), 7, np.uint16), 12))
    assert (grey(flat, Reading(window="minmax")) == 0).all()


def test_a_negative_slope_turns_the_levels_around(tmp_path: Path) -> None:
    pixels = ramp(12)
    path = save(tmp_path / "x.dcm", dicom(pixels, 12, RescaleSlope=-1, RescaleIntercept=4095))
    np.testing.assert_array_equal(grey(path), np.rint((4095 - pixels.astype(int)) / 4095 * 65535))


def test_a_voi_lut_of_eight_bits_for_levels_of_twelve(tmp_path: Path) -> None:
    # pydicom's own lookup wraps around at 256 here.
    entries = [i >> 4 for i in range(4096)]
    pixels = ramp(12)
    path = save(tmp_path / "x.dcm", dicom(pixels, 12, VOILUTSequence=lut(entries, 0, 8)))
    np.testing.assert_array_equal(grey(path), (pixels >> 4) * 257)


def test_unused_bits_are_not_levels(tmp_path: Path) -> None:
    pixels = ramp(12)
    marked = pixels | np.uint16(0xA000)  # an overlay of old, in the bits above
    out = grey(save(tmp_path / "x.dcm", dicom(marked, 12)))
    np.testing.assert_array_equal(out, np.rint(pixels / 4095 * 65535))


@pytest.mark.parametrize("interpretation", ["RGB", "YBR_FULL"])
def test_colour(tmp_path: Path, interpretation: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    data = dicom(pixels, 8, PhotometricInterpretation=interpretation)
    out = read_image(save(tmp_path / "x.dcm", data)).permute(1, 2, 0).numpy()
    from pydicom.pixels import convert_color_space

    expected = pixels if interpretation == "RGB" else convert_color_space(pixels, "YBR_FULL", "RGB")
    np.testing.assert_array_equal(out, expected)
    with pytest.raises(ImageError, match="no window; got --window 40/400"):
        read_image(tmp_path / "x.dcm", Reading(window="40/400"))


def test_a_palette_becomes_colour(tmp_path: Path) -> None:
    pixels = ramp(8)
    elements = {}
    for name, step in (("Red", 257), ("Green", 128), ("Blue", 3)):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        table = (np.arange(256) * step).astype("<u2")
        elements[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    data = dicom(pixels, 8, PhotometricInterpretation="PALETTE COLOR", **elements)
    out = read_image(save(tmp_path / "x.dcm", data)).permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(out, pixels[..., None].astype(np.uint16) * [257, 128, 3])


def test_frames_are_refused_or_chosen(tmp_path: Path) -> None:
    frames = np.stack([ramp(12), ramp(12)[::-1], ramp(12) // 2])
    path = save(tmp_path / "x.dcm", dicom(frames, 12))
    with pytest.raises(ImageError, match=r"3 frames; choose one with --dicom-frame"):
        read_image(path)
    for number in (1, 2, 3):
        out = grey(path, Reading(frame=number))
        np.testing.assert_array_equal(out, np.rint(frames[number - 1] / 4095 * 65535))
    for number in (0, 4):
        with pytest.raises(ImageError, match=f"3 frames, got --dicom-frame {number}"):
            read_image(path, Reading(frame=number))
    single = save(tmp_path / "one.dcm", dicom(ramp(12), 12))
    assert grey(single, Reading(frame=1)).shape == (64, 80)
    with pytest.raises(ImageError, match="it has 1 frame, got"):
        read_image(single, Reading(frame=2))


def test_a_frame_is_displayed_by_its_own_group(tmp_path: Path) -> None:
    def group(centre: float, slope: float) -> Dataset:
        voi, values, item = Dataset(), Dataset(), Dataset()
        voi.WindowCenter, voi.WindowWidth = centre, 500
        values.RescaleSlope, values.RescaleIntercept = slope, 0
        item.FrameVOILUTSequence, item.PixelValueTransformationSequence = [voi], [values]
        return item

    frames = np.stack([ramp(12), ramp(12)])
    data = dicom(frames, 12, PerFrameFunctionalGroupsSequence=[group(900, 1), group(4000, 2)])
    path = save(tmp_path / "x.dcm", data)
    for number, (centre, slope) in enumerate([(900, 1), (4000, 2)], start=1):
        flat = dicom(
            ramp(12),
            12,
            **{"WindowCenter": centre, "WindowWidth": 500, "RescaleSlope": slope},
            RescaleIntercept=0,
        )
        expected = grey(save(tmp_path / "flat.dcm", flat))
        np.testing.assert_array_equal(grey(path, Reading(frame=number)), expected)


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("signed", [False, True])
def test_lossless_syntaxes(tmp_path: Path, syntax: Any, signed: bool) -> None:
    data = dicom(ramp(12, signed=signed), 12, WindowCenter=700, WindowWidth=2000)
    plain = grey(save(tmp_path / "plain.dcm", data))
    data.compress(syntax)
    np.testing.assert_array_equal(grey(save(tmp_path / "x.dcm", data)), plain)


@pytest.mark.parametrize("syntax", [JPEGLossless, JPEGLosslessSV1])
def test_lossless_jpeg_as_mammography_uses_it(tmp_path: Path, syntax: Any) -> None:
    plain = grey(save(tmp_path / "plain.dcm", dicom(ramp(14), 14)))
    noise = np.random.default_rng(0).integers(0, 1 << 14, (31, 17), dtype=np.uint16)
    for pixels, expected in ((ramp(14), plain), (noise, np.rint(noise / 16383 * 65535))):
        data = as_lossless_jpeg(dicom(pixels, 14), syntax)
        np.testing.assert_array_equal(grey(save(tmp_path / "x.dcm", data)), expected)


def test_lossless_jpeg_keeps_signs(tmp_path: Path) -> None:
    data = dicom(ramp(12, signed=True), 12, WindowCenter=700, WindowWidth=2000)
    plain = grey(save(tmp_path / "plain.dcm", data))
    coded = as_lossless_jpeg(data, JPEGLosslessSV1)
    np.testing.assert_array_equal(grey(save(tmp_path / "x.dcm", coded)), plain)


def test_extended_jpeg_of_12_bits(tmp_path: Path) -> None:
    plain = grey(save(tmp_path / "plain.dcm", dicom(ramp(12), 12)))
    data = dicom(ramp(12), 12)
    coded = imagecodecs.jpeg8_encode(data.pixel_array, bitspersample=12, level=98)
    data.PixelData = encapsulate([coded])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    out = grey(save(tmp_path / "x.dcm", data))
    # In levels of 16 bits; the file's are 16 of them apart.
    assert np.abs(out.astype(int) - plain).max() <= 16 * 24


@pytest.mark.parametrize("kind", ["lossless", "extended"])
def test_damaged_jpeg_ends_no_process(tmp_path: Path, kind: str) -> None:
    """Bytes changed and cut at random: an image of the right shape or an error, in this process.
    (Lossless JPEG has no checksum: other pixels cannot be told from the right ones.)"""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 4096, (24, 31), dtype=np.uint16)
    data = dicom(pixels, 12)
    if kind == "lossless":
        coded = as_lossless_jpeg(data, JPEGLosslessSV1).PixelData
        whole, syntax = next(generate_frames(coded, number_of_frames=1)), JPEGLosslessSV1
    else:
        whole, syntax = imagecodecs.jpeg8_encode(pixels, bitspersample=12), JPEGExtended12Bit
    refused = read = 0
    for attempt in range(400):
        frame = bytearray(whole)
        for place in rng.integers(0, 60 if attempt % 2 else len(frame), rng.integers(1, 4)):
            frame[place] = rng.integers(0, 256)
        if attempt % 5 == 0:
            frame = frame[: rng.integers(2, len(frame))]
        data.PixelData = encapsulate([bytes(frame)])
        data["PixelData"].is_undefined_length = True
        data.file_meta.TransferSyntaxUID = syntax
        path = save(tmp_path / "x.dcm", data)
        try:
            assert read_image(path).shape[-2:] == (24, 31)
            read += 1
        except ImageError:
            refused += 1
    assert read > 20 and refused > 20


def test_a_frame_that_is_not_its_files_is_refused(tmp_path: Path) -> None:
    data = as_lossless_jpeg(dicom(ramp(12), 12), JPEGLosslessSV1)
    data.Rows = 60000
    with pytest.raises(ImageError, match=r"its file says \[60000, 80, 1\]"):
        read_image(save(tmp_path / "x.dcm", data), max_pixels=10**9)


def test_baseline_jpeg(tmp_path: Path) -> None:
    pixels = ramp(8)
    out = grey(save(tmp_path / "x.dcm", as_jpeg(dicom(pixels, 8))))
    assert np.abs(out.astype(int) - pixels).max() <= 4


@pytest.mark.parametrize("syntax", [None, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_a_cut_file_is_an_error(tmp_path: Path, syntax: Any) -> None:
    rng = np.random.default_rng(0)
    data = dicom(rng.integers(0, 4096, (64, 64), dtype=np.uint16), 12)
    if syntax is not None:
        data.compress(syntax)
    whole = save(tmp_path / "x.dcm", data).read_bytes()
    read_image(tmp_path / "x.dcm")
    for share in (0.0, 0.02, 0.1, 0.5, 0.9, 0.99):
        (tmp_path / "cut.dcm").write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ImageError):
            read_image(tmp_path / "cut.dcm")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(200), "begins like a PNG"),
        (b"\xff\xd8\xff\xe0" + bytes(200), "begins like a JPEG"),
        (b"<!DOCTYPE html>\n<html><body>404 not found</body></html>\n" * 9, "begins like text"),
        (b"P000,1,0\n", "begins like text"),
        (bytes(4000), "not a DICOM image: it has no Rows, .* no DICOM at all"),
    ],
)
def test_what_is_no_dicom_in_spite_of_its_name_is_called_so(
    tmp_path: Path, content: bytes, kind: str
) -> None:
    (tmp_path / "x.dcm").write_bytes(content)
    with pytest.raises(ImageError, match=kind):
        read_image(tmp_path / "x.dcm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("PixelData"), "not a DICOM image: it has no PixelData"),
        (lambda d: d.pop("Rows"), "it has no Rows"),
        (lambda d: setattr(d, "BitsStored", 17), "17 bits a sample"),
        (lambda d: setattr(d, "RescaleSlope", 0), "rescale slope 0.0"),
        (lambda d: setattr(d, "WindowWidth", 0), "Window Width"),
        (lambda d: setattr(d, "VOILUTSequence", lut([4096], 0, 12)), "VOI LUT does not hold"),
        (lambda d: setattr(d, "Rows", 60000), "damaged or unsupported"),
    ],
)
def test_what_has_no_right_pixels_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    elements = {"RescaleSlope": 1, "RescaleIntercept": 0, "WindowCenter": 9, "WindowWidth": 9}
    data = dicom(ramp(12), 12, **elements)
    change(data)
    path = save(tmp_path / "x.dcm", data)
    with pytest.raises(ImageError, match=message):
        read_image(path)


def test_too_many_pixels_are_refused_before_decoding(tmp_path: Path) -> None:
    path = save(tmp_path / "x.dcm", dicom(ramp(12), 12))
    with pytest.raises(ImageError, match="80 x 64 pixels are more than 5000 allowed"):
        read_image(path, max_pixels=5000)


def test_without_pydicom_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "x.dcm", dicom(ramp(12), 12))
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "pydicom":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImageError, match=r"pip install 'fpt-fast\[dicom\]'"):
        read_image(path)


def test_a_file_without_preamble_is_read_by_its_ending(tmp_path: Path) -> None:
    data = dicom(ramp(12), 12)
    whole = save(tmp_path / "whole.dcm", data).read_bytes()
    bare = dcmread(tmp_path / "whole.dcm")
    bare.file_meta = FileMetaDataset()
    bare.preamble = None
    bare.save_as(tmp_path / "bare.dcm", implicit_vr=True, little_endian=True)
    assert (tmp_path / "bare.dcm").read_bytes()[128:132] != b"DICM" != whole[:4]
    np.testing.assert_array_equal(grey(tmp_path / "bare.dcm"), grey(tmp_path / "whole.dcm"))
    (tmp_path / "junk.dcm").write_bytes(bytes(range(256)) * 3)
    with pytest.raises(ImageError):
        read_image(tmp_path / "junk.dcm")


def test_archives_export_names_without_an_ending(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
        for name in ("IM00001", "1.2.840.7", "x.dcm"):
            save(tmp_path / label / name, dicom(ramp(12), 12))
        (tmp_path / label / "LICENSE").write_text("not an image")
    names = {path.name for path in list_images([tmp_path])}
    assert names == {"IM00001", "1.2.840.7", "x.dcm"}
    assert len(load_image_set(tmp_path).items) == 6
