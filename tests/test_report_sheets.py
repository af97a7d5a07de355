"""Pictures that stand alone: each part is where it is told to be, and so are the words."""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from token_examples import looking_example, make_example

from fpt_fast.records import TokenExample
from fpt_fast.report import sheets
from fpt_fast.report.sheets import draw_heads, draw_sheet

Words = dict[str, tuple[int, int]]


@pytest.fixture
def words(monkeypatch: pytest.MonkeyPatch) -> Words:
    """Every text that is drawn, and where."""
    found: Words = {}
    write = sheets._Sheet.write

    def note(sheet: sheets._Sheet, text: str, at: tuple[int, int], *rest: object) -> None:
        found[text] = at
        write(sheet, text, at, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(sheets._Sheet, "write", note)
    return found


def pixels_of(png: bytes) -> NDArray[np.int64]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(np.int64)


def checked() -> TokenExample:
    """Two prompts' example over a checkerboard of patches, so that the image itself can be told."""
    bright = torch.tensor([[40, 200, 40], [200, 40, 200]], dtype=torch.uint8)
    pixels = bright.repeat_interleave(8, 0).repeat_interleave(8, 1).expand(3, -1, -1).contiguous()
    return looking_example(pixels=pixels, key="a folder/one image.png")


@pytest.mark.parametrize(("what", "highest", "best"), [("kept", 1.0, 0), ("attention", 0.375, 5)])
def test_the_image_stands_beside_its_map_and_the_bar_says_what_colours_mean(
    what: sheets.What, highest: float, best: int, words: Words
) -> None:
    picture = pixels_of(draw_sheet(checked(), what, "predicted mild 60.0%"))
    low, high = words["0.0%"], words[f"{highest:.1%}"]
    top = high[1]
    height, width = 427, 640  # of 16x24, its longest side brought to 640
    centres = np.s_[top + 107 : top + height : 213, 16 + 106 : 16 + width : 213]
    assert (picture[centres][..., 0] > 128).tolist() == [[False, True, False], [True, False, True]]
    right = 16 + width + 12
    beside = picture[top + 107 : top + height : 213, right + 106 : right + width : 213]
    # Colour is half of it: less the grey that is the other half, the highest patch has most.
    colour = beside.sum(axis=2) - 1.5 * picture[centres][..., 0]
    assert int(colour.argmax()) == best
    assert (picture[top, right : right + 200] == 255).all() == (
        best == 0
    )  # a frame, where it is best
    bar = picture[top : top + height, right + width + 12 + 9].sum(axis=1)
    assert bar[0] > bar[height // 2] > bar[-1] and (np.diff(bar) <= 0).mean() > 0.9
    assert low[1] > high[1] + height // 2
    said = " ".join(words)
    assert words["a folder/one image.png"][1] < words["predicted mild 60.0%"][1] < top
    assert "Frames: the 1 highest patch" in said and "2 layers" in said
    assert ("2 prompts" in said) == (what == "attention")
    # Nothing is drawn outside.
    assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()


def test_heads_stand_by_layer_and_head(words: Words) -> None:
    example = checked()
    for what in sheets.WHAT:
        picture = pixels_of(draw_heads(example, what, "said"))
        for name in ("image", "head 0", "head 1", "layer 2", "layer 3"):
            assert name in words
        assert words["layer 2"][1] < words["layer 3"][1]
        step = words["head 1"][0] - words["head 0"][0]
        assert step == words["head 0"][0] - words["image"][0]
        assert (picture[[0, -1]] == 255).all() and (picture[:, [0, -1]] == 255).all()
    # The last layer's last head looks at the last patch alone (of the attention, drawn last).
    width = step - 12
    height = round(width * 16 / 24)
    left, middle = words["head 1"][0], words["layer 3"][1] + 6
    rows = [middle - height // 4, middle + height // 4]
    columns = [left + width // 6, left + width // 2, left + 5 * width // 6]
    seen = picture[np.ix_(rows, columns)]
    grey = pixels_of(draw_heads(example, "attention"))  # the same picture, without a second line
    assert grey.shape[0] < picture.shape[0]
    colour = seen.sum(axis=2) - 1.5 * np.array([[40, 200, 40], [200, 40, 200]])
    assert int(colour.argmax()) == 5


def test_long_names_and_flat_maps_fit() -> None:
    long = "/".join(["a folder with a long name"] * 12) + "/x.png"
    even = torch.arange(1, 7, dtype=torch.int32).repeat(2, 2, 1)
    flat = make_example(key=long, index=even)
    said = "; ".join(f"finding {i} 12.3%" for i in range(60))
    picture = pixels_of(draw_sheet(flat, "kept", said))
    assert (picture[:, [0, -1]] == 255).all() and (picture[[0, -1]] == 255).all()


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="no prompt weights"):
        draw_sheet(make_example(), "attention", "")
    with pytest.raises(ValueError, match="what must be 'kept' or 'attention', got 'lost'"):
        draw_heads(looking_example(), "lost")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="what must be 'kept' or 'attention', got 'lost'"):
        draw_sheet(looking_example(), "lost", "")  # type: ignore[arg-type]
