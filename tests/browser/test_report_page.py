"""``report.html`` as its readers see it: sorted, filtered, on a narrow screen, and legible."""

import io
import itertools
from pathlib import Path

import pytest
import torch
from pages import LOW_CONTRAST, column, control, narrow_width, open_page, press, rows
from PIL import Image
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from fpt_fast.records import EpochRecord, Predictions, TrainingHistory
from fpt_fast.report import write_report
from fpt_fast.trust import assess

CLASSES = ("healthy", "mild", "severe <b>")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images of 3 classes; every third one is predicted wrong."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    guesses = torch.where(torch.arange(60) % 7 == 0, (labels + 1) % 3, labels)
    logits = torch.rand(60, 3) + 3 * torch.nn.functional.one_hot(guesses, 3)
    keys = tuple(f"test/patient-{number}/image-{number}.png" for number in range(60))
    predictions = Predictions(keys, labels, logits, logits.softmax(1))
    file = io.BytesIO()
    Image.new("RGB", (32, 24), (90, 120, 60)).save(file, "JPEG")
    epochs = tuple(
        EpochRecord(e, 1 / (e + 1), 1e-3, 2.0, {"loss": 1.0, "auc": 0.6 + e / 20}) for e in range(4)
    )
    return write_report(
        tmp_path_factory.mktemp("run"),
        history=TrainingHistory(epochs, "auc", 3, 0.75),
        predictions=predictions,
        classes=CLASSES,
        assessment=assess(predictions, 3, resamples=50),
        thumbnails={key: file.getvalue() for key in keys[:10]},
        settings={"learning_rate": 1e-3, "data": "/a/long/path" * 8},
    )


def test_nothing_complains_and_the_wrong_ones_come_first(wide: Chrome, page: Path) -> None:
    open_page(wide, page)
    assert wide.get_log("browser") == []
    verdicts = column(wide, 4)
    assert verdicts == ["wrong"] * 9 + ["right"] * 51
    assert "60 of 60 images" in wide.find_element(By.TAG_NAME, "output").text
    pictures = wide.find_elements(By.CSS_SELECTOR, "table.predictions img")
    assert len(pictures) == 10


def test_sorting(wide: Chrome, page: Path) -> None:
    open_page(wide, page)
    assert press(wide, "its probability") == "ascending"
    assert column(wide, 5) == sorted(column(wide, 5), key=float)
    assert press(wide, "its probability") == "descending"
    assert column(wide, 5) == sorted(column(wide, 5), key=float, reverse=True)
    assert press(wide, "image") == "ascending"
    # By number, as a person sorts them: image-2 before image-10.
    assert column(wide, 1)[:3] == [f"test/patient-{n}/image-{n}.png" for n in range(3)]
    sorted_by = wide.find_elements(By.CSS_SELECTOR, "th[aria-sort=ascending]")
    assert len(sorted_by) == 1


def test_filtering(wide: Chrome, page: Path) -> None:
    open_page(wide, page)
    Select(control(wide, "verdict")).select_by_visible_text("wrong")
    assert len(rows(wide)) == 9
    Select(control(wide, "label")).select_by_visible_text("severe <b>")
    assert set(column(wide, 2)) == {"severe <b>"} and set(column(wide, 4)) == {"wrong"}
    few = len(rows(wide))
    assert f"{few} of 60 images" in wide.find_element(By.TAG_NAME, "output").text
    Select(control(wide, "verdict")).select_by_visible_text("all")
    Select(control(wide, "label")).select_by_visible_text("all")
    control(wide, "key").send_keys("IMAGE-5")
    assert len(rows(wide)) == 11  # 5, 50 .. 59
    press(wide, "image")
    assert len(rows(wide)) == 11


def test_a_narrow_screen_scrolls_tables_and_never_the_page(browser: Chrome, page: Path) -> None:
    assert narrow_width(browser, page) <= 360


def test_names_of_rows_are_not_broken_into_letters(browser: Chrome, page: Path) -> None:
    assert narrow_width(browser, page) <= 360
    widths = browser.execute_script(
        "return Array.from(document.querySelectorAll('.scroll th[scope=row]'), "
        "name => name.clientWidth)"
    )
    assert widths and min(widths) >= 90


def test_every_text_is_legible(wide: Chrome, page: Path) -> None:
    open_page(wide, page)
    assert wide.execute_script(LOW_CONTRAST) == []


def test_headings_and_controls_have_names(wide: Chrome, page: Path) -> None:
    open_page(wide, page)
    for element in wide.find_elements(By.CSS_SELECTOR, "input, select, button, img, th"):
        assert element.accessible_name or element.get_attribute("alt") == "", element.tag_name
    levels = [
        int(element.tag_name[1]) for element in wide.find_elements(By.CSS_SELECTOR, "h1, h2, h3")
    ]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_numbers_are_sorted_by_what_they_are_worth(wide: Chrome, tmp_path: Path) -> None:
    labels = torch.linspace(-40, 60, 20, dtype=torch.float64)
    off = 10 ** torch.linspace(-3, 1.3, 20, dtype=torch.float64) * torch.tensor([1.0, -1.0] * 10)
    labels[3] = torch.nan
    keys = tuple(f"image-{number}.png" for number in range(20))
    predictions = Predictions(keys, labels, (labels.nan_to_num() + off)[:, None], None)
    page = write_report(
        tmp_path,
        history=None,
        predictions=predictions,
        classes=("pressure",),
        assessment=assess(predictions, 1, resamples=50),
    )
    open_page(wide, page)
    assert wide.get_log("browser") == []
    assert column(wide, 1)[-1] == keys[3] and len(rows(wide)) == 20
    known = [float(text) for text in column(wide, 5)[:-1]]
    assert known == sorted(known, reverse=True)
    for title, place in (("true", 2), ("predicted", 3), ("error", 4), ("off by", 5)):
        assert press(wide, title) == "ascending"
        said = [float(text) for text in column(wide, place) if text]
        assert said == sorted(said) and len(said) >= 19, title
        assert press(wide, title) == "descending"
        said = [float(text) for text in column(wide, place) if text]
        assert said == sorted(said, reverse=True), title
    control(wide, "key").send_keys("image-1")
    assert len(rows(wide)) == 11
    assert wide.execute_script(LOW_CONTRAST) == []


def test_grades_are_filtered_and_sorted_by_error(wide: Chrome, tmp_path: Path) -> None:
    labels = torch.arange(30) % 3
    generator = torch.Generator().manual_seed(0)
    values = labels[:, None] + torch.randn(30, 1, generator=generator)
    keys = tuple(f"image-{number}.png" for number in range(30))
    predictions = Predictions(keys, labels, values, None, (0.4, 1.6))
    page = write_report(
        tmp_path,
        history=None,
        predictions=predictions,
        classes=CLASSES,
        assessment=assess(predictions, 3, resamples=50),
    )
    open_page(wide, page)
    off = [float(text) for text in column(wide, 7)]
    assert off == sorted(off, reverse=True)
    assert press(wide, "error") == "ascending"
    errors = [float(text) for text in column(wide, 6)]
    assert errors == sorted(errors) and errors[0] < 0 < errors[-1]
    Select(control(wide, "verdict")).select_by_visible_text("wrong")
    Select(control(wide, "label")).select_by_visible_text("mild")
    assert set(column(wide, 2)) == {"mild"} and "mild" not in column(wide, 3)
