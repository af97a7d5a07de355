"""Measured mean and std, the search for unreadable images, and the published presets."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpt_fast.images import (
    ImageError,
    check_images,
    dataset_preset,
    format_unreadable,
    measure_statistics,
    preset_names,
    read_image,
    to_network_input,
)
from fpt_fast.records import ImageItem, Preprocessing


def write_items(folder: Path, images: Sequence[np.ndarray]) -> list[ImageItem]:
    items = []
    for number, pixels in enumerate(images):
        path = folder / f"{number:02}.png"
        Image.fromarray(pixels).save(path)
        items.append(ImageItem(path.name, path, 0, "train"))
    return items


def random_images(count: int, channels: int = 3) -> list[np.ndarray]:
    """Different sizes and brightness, so that means of images differ."""
    rng = np.random.default_rng(0)
    shapes = [(20 + 3 * i, 50 - 2 * i, channels) for i in range(count)]
    images = [rng.integers(0, 40 + 20 * i, shape) for i, shape in enumerate(shapes)]
    return [image.squeeze().astype(np.uint8) for image in images]


class TestMeasureStatistics:
    def test_are_over_all_pixels_of_the_network_input(self, tmp_path: Path) -> None:
        items = write_items(tmp_path, random_images(8))
        unit = Preprocessing((24, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        inputs = torch.stack([to_network_input(read_image(i.path), unit) for i in items]).double()
        mean, std = measure_statistics(items, size=(24, 32))
        torch.testing.assert_close(
            torch.tensor(mean).double(), inputs.mean((0, 2, 3)), rtol=0, atol=1e-7
        )
        expected = inputs.transpose(0, 1).flatten(1).std(dim=1, correction=0)
        torch.testing.assert_close(torch.tensor(std).double(), expected, rtol=0, atol=1e-7)

    def test_normalised_inputs_have_mean_0_and_std_1(self, tmp_path: Path) -> None:
        items = write_items(tmp_path, random_images(6, channels=1))
        mean, std = measure_statistics(items, size=(16, 16))
        assert mean[0] == mean[1] == mean[2] and std[0] == std[2]
        preprocessing = Preprocessing((16, 16), mean, std)
        inputs = torch.stack([to_network_input(read_image(i.path), preprocessing) for i in items])
        assert inputs.mean().abs() < 1e-5 and abs(inputs.std(correction=0) - 1) < 1e-5

    def test_16_bits(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 65536, (16, 16)).astype(np.uint16) for _ in range(3)]
        mean, std = measure_statistics(write_items(tmp_path, images), size=(16, 16))
        values = np.stack(images) / 65535
        assert mean[1] == pytest.approx(values.mean(), abs=1e-7)
        assert std[1] == pytest.approx(values.std(), abs=1e-7)

    def test_do_not_depend_on_the_number_of_workers(self, tmp_path: Path) -> None:
        items = write_items(tmp_path, random_images(9))
        results = {measure_statistics(items, size=(16, 16), workers=w) for w in (1, 2, 5)}
        assert len(results) == 1

    def test_refusals(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="at least one image"):
            measure_statistics([], size=(8, 8))
        items = write_items(tmp_path, [np.full((8, 8, 3), (0, 9, 9), np.uint8)] * 2)
        with pytest.raises(ValueError, match="all pixels of a channel have one value"):
            measure_statistics(items, size=(8, 8))
        items[1].path.write_bytes(b"")
        with pytest.raises(ImageError, match="empty") as caught:
            measure_statistics(items, size=(8, 8))
        assert caught.value.key == "01.png"
        with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
            measure_statistics(items, size=(8, 8), workers=0)


class TestCheckImages:
    def test_finds_all_that_cannot_be_read(self, tmp_path: Path) -> None:
        items = write_items(tmp_path, random_images(8))
        items[6].path.write_bytes(items[6].path.read_bytes()[:-60])
        items[1].path.unlink()
        items[4].path.write_bytes(b"text")
        seen: list[int] = []
        errors = check_images(items[::-1], workers=3, on_done=seen.append)
        assert [error.key for error in errors] == ["01.png", "04.png", "06.png"]
        assert [error.path for error in errors] == [items[i].path for i in (1, 4, 6)]
        assert seen == list(range(1, 9))
        message = format_unreadable(errors)
        assert message.startswith("3 images cannot be read:\n  01.png: no such file\n  04.png: ")

    def test_nothing_wrong(self, tmp_path: Path) -> None:
        assert check_images(write_items(tmp_path, random_images(3))) == []
        assert check_images([]) == []

    def test_message_names_20_and_counts_the_rest(self) -> None:
        errors = [ImageError(Path(f"{i:02}.png"), "damaged") for i in range(23)]
        message = format_unreadable(errors)
        assert message.startswith("23 images cannot be read:")
        assert "19.png: damaged" in message and "20.png" not in message
        assert message.endswith("... and 3 more")
        assert format_unreadable(errors[:1]) == "1 image cannot be read:\n  00.png: damaged"


class TestPresets:
    def test_are_the_published_ones(self) -> None:
        names = ("chncxr", "cmmd", "covid", "ddr", "ddsm", "isic2016", "isic2018", "messidor2")
        assert preset_names() == names
        presets = [dataset_preset(name) for name in names]
        assert [preset.num_classes for preset in presets] == [2, 2, 3, 5, 3, 2, 7, 5]
        rates = [5e-4, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-4, 2e-4]
        assert [preset.learning_rate for preset in presets] == rates
        assert {preset.input_size for preset in presets} == {512}
        ddr = dataset_preset("DDR")
        assert ddr.name == "ddr"
        assert ddr.mean == (0.423737496137619, 0.2609460651874542, 0.128403902053833)
        assert ddr.std == (0.29482534527778625, 0.20167365670204163, 0.13668020069599152)
        # Grey data sets: three equal channels.
        for preset in presets[:2] + presets[4:5]:
            assert len(set(preset.mean)) == len(set(preset.std)) == 1

    def test_unknown_name(self) -> None:
        with pytest.raises(ValueError, match=r"'imagenet'; there are chncxr, cmmd, .*messidor2"):
            dataset_preset("imagenet")
