"""A damaged file ends in an ImageError, never in half an image, never in a crash."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from images.files import png16, png_file
from PIL import Image, ImageFile

from fpt_fast.images import ImageError, jpeg, read_image, read_item
from fpt_fast.records import ImageItem


def noisy(height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write(path: Path, pixels: np.ndarray | None = None, **settings: object) -> Path:
    Image.fromarray(noisy() if pixels is None else pixels).save(path, **settings)
    return path


def refused(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        read_image(path)
    assert caught.value.path == path and str(path) in str(caught.value)
    return caught.value.reason


NAMES = ["x.jpg", "x.png", "x.tif", "x.bmp", "x.webp"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_truncated(tmp_path: Path, name: str, share: float) -> None:
    path = write(tmp_path / name)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    assert refused(path)


@pytest.mark.parametrize("settings", [{}, {"progressive": True}, {"quality": 100}])
@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize("decoder", ["torchvision", "pillow"])
def test_truncated_jpeg_with_an_end_marker(
    tmp_path: Path,
    settings: dict[str, object],
    grey: bool,
    decoder: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """libjpeg only warns here, and fills the lower half with grey or a blur."""
    if decoder == "pillow":
        monkeypatch.setattr(jpeg, "decode_jpeg", None)
    path = write(tmp_path / "x.jpg", noisy()[..., 0] if grey else None, **settings)
    data = path.read_bytes()
    for share in (0.3, 0.5, 0.8):
        cut = data[: int(share * len(data))].rstrip(b"\xff")
        path.write_bytes(cut + b"\xff\xd9")
        assert refused(path)


def test_jpeg_that_really_ends_in_mid_grey(tmp_path: Path) -> None:
    for value in (128, (128, 128, 128)):
        mode = "L" if isinstance(value, int) else "RGB"
        image = Image.new(mode, (40, 40), value)
        image.paste(Image.fromarray(noisy(20, 20)).convert(mode), (0, 0))
        for settings in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
            path = tmp_path / "x.jpg"
            image.save(path, quality=95, **settings)
            assert (read_image(path)[:, -1, -1] == 128).all()


@pytest.mark.parametrize("extra", [b"", b"trailing bytes", b"\xff\xd8\xff\xd9"])
def test_bytes_after_a_whole_jpeg_do_no_harm(tmp_path: Path, extra: bytes) -> None:
    path = write(tmp_path / "x.jpg", np.full((16, 16, 3), 128, np.uint8))
    path.write_bytes(path.read_bytes() + extra)
    assert read_image(path).shape == (3, 16, 16)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_damaged_16_bit_colour_png(tmp_path: Path, channels: int) -> None:
    """torchvision's decoder crashes the process on such files; it must never see them."""
    rng = np.random.default_rng(0)
    data = png16(rng.integers(0, 65536, (12, 9, channels)).astype(np.uint16))
    path = tmp_path / "x.png"
    for share in (0.2, 0.5, 0.9):
        path.write_bytes(data[: int(share * len(data))])
        assert refused(path)
    for offset in range(41, len(data) - 20, 37):
        flipped = bytearray(data)
        flipped[offset] ^= 0x55
        path.write_bytes(flipped)
        assert refused(path)


def header16(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no zlib stream at all",
        zlib.compress(b"\0" * 10),
        zlib.compress(b"\0" * 10_000_000),
        zlib.compress(b"\x09" * (4 * 25)),
        zlib.compress(b"\0" * (4 * 25))[:-6],
    ],
)
def test_16_bit_colour_png_with_right_checksums_and_wrong_data(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(png_file([header16(4, 4), (b"IDAT", body), (b"IEND", b"")]))
    assert refused(path)


def test_flipped_bytes_never_crash(tmp_path: Path) -> None:
    """Whatever the bytes, the answer is an image of the right shape or an ImageError."""
    rng = np.random.default_rng(1)
    path = tmp_path / "x"
    sources = [write(tmp_path / name).read_bytes() for name in NAMES]
    sources.append(png16(rng.integers(0, 65536, (12, 9, 3)).astype(np.uint16)))
    errors = 0
    for data in sources:
        for _ in range(60):
            damaged = bytearray(data)
            for offset in rng.integers(0, len(data), 4):
                damaged[offset] = rng.integers(256)
            path.write_bytes(damaged)
            try:
                assert read_image(path, max_pixels=1_000_000).shape[0] == 3
            except ImageError:
                errors += 1
    assert errors > 60


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.touch()
    assert refused(path) == "the file is empty"


def test_text_named_png(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_text("not an image")
    assert "not an image" in refused(path)


def test_directory_named_png(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.mkdir()
    assert "directory" in refused(path)


def test_missing_file(tmp_path: Path) -> None:
    assert refused(tmp_path / "x.png") == "no such file"


def test_too_many_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.png")
    with pytest.raises(ImageError, match="64 x 48 pixels are more than 3000"):
        read_image(path, max_pixels=3000)
    assert read_image(path, max_pixels=48 * 64).shape == (3, 48, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert "exceeds limit" in refused(path)


def test_pillow_must_not_accept_truncated_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="LOAD_TRUNCATED_IMAGES must be False"):
        read_image(write(tmp_path / "x.png"))


def test_errors_of_a_data_set_carry_the_key(tmp_path: Path) -> None:
    item = ImageItem("cat/x.png", tmp_path / "cat" / "x.png", 0, "train")
    with pytest.raises(ImageError, match="no such file") as caught:
        read_item(item)
    assert caught.value.key == "cat/x.png"
