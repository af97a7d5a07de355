"""Every format and depth that read_image knows, against the pixels that were written."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from images.files import BLACK_IS_ZERO, CIELAB, FLOAT, RGB, SIGNED, WHITE_IS_ZERO, png16, write_tiff
from PIL import Image, ImageOps

from fpt_fast.images import ImageError, jpeg, read_image
from fpt_fast.images.transforms import merge_grey
from fpt_fast.records import Reading

HEIGHT, WIDTH = 20, 31


def colour(channels: int = 3) -> npt.NDArray[np.uint8]:
    """Smooth enough for JPEG, every channel its own."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    planes = [y * 12, x * 8, (x + y) * 5, 255 - x * 8]
    return np.stack(planes[:channels], axis=-1).astype(np.uint8)


def grey16() -> npt.NDArray[np.uint16]:
    """Covers the range up to 65535, with low bytes that matter."""
    values = np.linspace(0, 65535, HEIGHT * WIDTH).round().astype(np.uint16)
    return values.reshape(HEIGHT, WIDTH)


def decoded(path: Path) -> npt.NDArray[np.generic]:
    """What read_image gives, as [h, w, 3]."""
    image = read_image(path)
    assert image.shape[0] == 3 and image.dtype in (torch.uint8, torch.uint16)
    return image.permute(1, 2, 0).numpy()


def save(path: Path, image: Image.Image, **settings: object) -> Path:
    image.save(path, **settings)
    return path


LOSSLESS = [("x.png", {}), ("x.bmp", {}), ("x.tif", {}), ("x.TIFF", {"compression": "tiff_lzw"})]
LOSSLESS += [("x.webp", {"lossless": True})]


@pytest.mark.parametrize(("name", "settings"), LOSSLESS)
def test_lossless_rgb(tmp_path: Path, name: str, settings: dict[str, object]) -> None:
    path = save(tmp_path / name, Image.fromarray(colour()), **settings)
    out = decoded(path)
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, colour())


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif"])
def test_grey_is_repeated_and_shares_memory(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, Image.fromarray(colour()[..., 1]))
    np.testing.assert_array_equal(decoded(path), np.repeat(colour()[..., 1:2], 3, axis=2))
    if name != "x.bmp":
        assert read_image(path).untyped_storage().nbytes() == HEIGHT * WIDTH


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.webp"])
def test_alpha_is_dropped_as_by_pillow(tmp_path: Path, name: str) -> None:
    settings = {"lossless": True, "exact": True} if name == "x.webp" else {}
    path = save(tmp_path / name, Image.fromarray(colour(4)), **settings)
    np.testing.assert_array_equal(decoded(path), colour(3))
    np.testing.assert_array_equal(decoded(path), np.asarray(Image.open(path).convert("RGB")))


def test_grey_with_alpha(tmp_path: Path) -> None:
    path = save(tmp_path / "x.png", Image.fromarray(colour(2)))
    np.testing.assert_array_equal(decoded(path), np.repeat(colour()[..., :1], 3, axis=2))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(64))])
def test_palette(tmp_path: Path, transparency: object) -> None:
    indexed = Image.fromarray(colour()).quantize(64)
    settings = {} if transparency is None else {"transparency": transparency}
    path = save(tmp_path / "x.png", indexed, **settings)
    np.testing.assert_array_equal(decoded(path), np.asarray(indexed.convert("RGB")))


def test_one_bit(tmp_path: Path) -> None:
    bits = colour()[..., 0] > 100
    path = save(tmp_path / "x.png", Image.fromarray(bits))
    expected = np.repeat(bits[..., None] * np.uint8(255), 3, axis=2)
    np.testing.assert_array_equal(decoded(path), expected)


@pytest.fixture(params=["torchvision", "pillow"])
def jpeg_decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both decoders of JPEG; torchvision has announced that it drops its own."""
    if request.param == "pillow":
        monkeypatch.setattr(jpeg, "decode_jpeg", None)
    return request.param


@pytest.mark.usefixtures("jpeg_decoder")
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"subsampling": 0}])
def test_jpeg_agrees_with_pillow(tmp_path: Path, mode: str, settings: dict[str, object]) -> None:
    source = Image.fromarray(colour()).convert(mode)
    path = save(tmp_path / "x.jpeg", source, quality=90, **settings)
    expected = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert abs(decoded(path).astype(int) - expected).max() <= 2
    assert abs(decoded(path).astype(int) - np.asarray(source.convert("RGB"))).mean() < 6


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_grey_16_bit_keeps_its_range(tmp_path: Path, name: str) -> None:
    """Trap R7 of the published code: by way of 8 bits everything above 255 turned white."""
    out = decoded(save(tmp_path / name, Image.fromarray(grey16())))
    assert out.dtype == np.uint16
    np.testing.assert_array_equal(out, np.repeat(grey16()[..., None], 3, axis=2))


def test_grey_16_bit_big_endian_and_white_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "big.tif"
    big = Image.frombytes("I;16B", (WIDTH, HEIGHT), grey16().astype(">u2").tobytes())
    big.save(path)
    np.testing.assert_array_equal(decoded(path)[..., 0], grey16())
    path = write_tiff(tmp_path / "inverted.tif", grey16()[..., None], WHITE_IS_ZERO)
    np.testing.assert_array_equal(decoded(path)[..., 0], 65535 - grey16())


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH), (1, 1), (3, 2)])
def test_png_16_bit_keeps_all_bits(
    tmp_path: Path, interlaced: bool, channels: int, shape: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 65536, (*shape, channels)).astype(np.uint16)
    path = tmp_path / "x.png"
    path.write_bytes(png16(pixels, interlaced=interlaced))
    out = decoded(path)
    assert out.dtype == np.uint16
    colours = pixels[..., :3] if channels > 2 else np.repeat(pixels[..., :1], 3, axis=2)
    np.testing.assert_array_equal(out, colours)


def test_tiff_32_bit_within_16_bits(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "x.tif", grey16().astype(np.uint32)[..., None], BLACK_IS_ZERO)
    assert decoded(path).dtype == np.uint16
    np.testing.assert_array_equal(decoded(path)[..., 0], grey16())
    signed = (grey16() // 2).astype(np.int16)[..., None]
    path = write_tiff(tmp_path / "s.tif", signed, BLACK_IS_ZERO, SIGNED)
    np.testing.assert_array_equal(decoded(path)[..., :1], signed)


REFUSED = {
    "float": (grey16().astype(np.float32)[..., None], BLACK_IS_ZERO, FLOAT, "floating-point"),
    "negative": (grey16().astype(np.int32)[..., None] - 9, BLACK_IS_ZERO, SIGNED, r"-9\.\.65526"),
    "too large": (grey16().astype(np.uint32)[..., None] * 2, BLACK_IS_ZERO, 1, "131070"),
    "signed 8": (colour()[..., :1].view(np.int8), BLACK_IS_ZERO, SIGNED, "signed 8-bit"),
    "colour 16": (np.repeat(grey16()[..., None], 3, 2), RGB, 1, "16-bit colour TIFF"),
    "lab": (colour(), CIELAB, 1, "LAB"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_samples_without_a_right_place_are_refused(tmp_path: Path, case: str) -> None:
    pixels, photometric, sample_format, reason = REFUSED[case]
    path = write_tiff(tmp_path / "x.tif", pixels, photometric, sample_format)
    with pytest.raises(ImageError, match=reason) as caught:
        read_image(path)
    assert caught.value.path == path


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp", "grey.jpg", "deep.png"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, name: str, orientation: int) -> None:
    source = Image.fromarray(colour())
    if name.startswith("grey"):
        source = source.convert("L")
    if name.startswith("deep"):
        source = Image.fromarray(grey16())
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / name, source, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    expected = np.asarray(upright if name.startswith("deep") else upright.convert("RGB"))
    out = decoded(path)
    assert out.shape[:2] == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))
    if expected.ndim == 2:
        expected = np.repeat(expected[..., None], 3, axis=2)
    assert abs(out.astype(int) - expected.astype(int)).max() <= 2 * name.endswith("jpg")


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_meaningless_orientation_is_none(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.png", Image.fromarray(colour()), exif=exif)
    np.testing.assert_array_equal(decoded(path), colour())


@pytest.mark.parametrize(
    "name", ["größe 1.png", "图像.png", "with space.png", "a'b\"c.png", "x.PNG"]
)
def test_names(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / name, Image.fromarray(colour()))
    np.testing.assert_array_equal(decoded(path), colour())
    np.testing.assert_array_equal(read_image(str(path)).permute(1, 2, 0).numpy(), colour())


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.tif"])
def test_extreme_shapes(tmp_path: Path, shape: tuple[int, int], name: str) -> None:
    path = save(tmp_path / name, Image.new("RGB", shape[::-1], (200, 100, 50)))
    out = decoded(path).astype(int)
    assert out.shape == (*shape, 3)
    assert abs(out - [200, 100, 50]).max() <= 2


def test_channels_last_in_memory(tmp_path: Path) -> None:
    """The layout that resizes fastest; a grey image is one plane."""
    image = read_image(save(tmp_path / "x.jpg", Image.fromarray(colour())))
    assert image.permute(1, 2, 0).is_contiguous()
    grey = read_image(save(tmp_path / "g.jpg", Image.fromarray(colour()[..., 0])))
    assert merge_grey(grey).shape[0] == 1


def test_a_window_of_sixteen_bit_grey(tmp_path: Path) -> None:
    values = (grey16() // 20 + 500).astype(np.uint16)
    path = save(tmp_path / "x.png", Image.fromarray(values))
    for window in ("file", "full"):
        np.testing.assert_array_equal(read_image(path, Reading(window))[0].numpy(), values)
    spread = read_image(path, Reading("minmax"))[0].numpy()
    low, high = int(values.min()), int(values.max())
    np.testing.assert_array_equal(
        spread, np.rint((values.astype(float) - low) / (high - low) * 65535)
    )
    assert len(np.unique(spread)) == len(np.unique(values))
    given = read_image(path, Reading("1000/600"))[0].numpy()
    expected = np.clip((values - 999.5) / 599 + 0.5, 0, 1) * 65535
    assert np.abs(given - expected).max() <= 0.5 + 1e-6
    with pytest.raises(ImageError, match="grey images of more than 8 bits, and this one has"):
        read_image(save(tmp_path / "c.png", Image.fromarray(colour())), Reading("minmax"))
