"""The page of several runs as its readers see it."""

import itertools
from pathlib import Path

import pytest
from compared_runs import write_runs
from pages import LOW_CONTRAST, column, control, narrow_width, open_page, press, rows
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.support.select import Select

from fpt_fast.pipeline import compare_runs


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("compared")
    found = compare_runs(write_runs(root), output=root / "page.html", resamples=50, pictures=10)
    return found.page


def test_disagreements_are_sorted_and_filtered(wide: Chrome, page: Path) -> None:
    open_page(wide, page)
    assert wide.get_log("browser") == []
    every = column(wide, 1)
    assert len(every) > 10 and len(set(every)) == len(every)
    assert f"{len(every)} of {len(every)} images" in wide.find_element(By.TAG_NAME, "output").text
    assert press(wide, "right") == "ascending"
    right = column(wide, 3)
    assert right == sorted(right) and len(set(right)) > 1
    assert press(wide, "seed-1") == "ascending"
    assert column(wide, 5) == sorted(column(wide, 5))
    Select(control(wide, "label")).select_by_visible_text("severe <b>")
    assert set(column(wide, 2)) == {"severe <b>"}
    Select(control(wide, "label")).select_by_visible_text("all")
    control(wide, "key").send_keys("IMAGE-5")
    assert 0 < len(rows(wide)) < len(every) and all("image-5" in key for key in column(wide, 1))


def test_pictures_are_drawn(wide: Chrome, page: Path) -> None:
    open_page(wide, page)
    widths = wide.execute_script(
        "const images = Array.from(document.images);"
        "images.forEach(image => image.loading = 'eager');"
        "return Promise.all(images.map(i => i.decode().then(() => i.naturalWidth)));"
    )
    # Learning curves, three classes, ten pictures.
    assert len(widths) == 14 and all(widths)


def test_a_narrow_screen_scrolls_tables_and_never_the_page(browser: Chrome, page: Path) -> None:
    assert narrow_width(browser, page) <= 360


def test_every_text_is_legible_and_named(wide: Chrome, page: Path) -> None:
    open_page(wide, page)
    assert wide.execute_script(LOW_CONTRAST) == []
    for element in wide.find_elements(By.CSS_SELECTOR, "input, select, button, img, th"):
        assert element.accessible_name or element.get_attribute("alt") == "", element.tag_name
    levels = [int(h.tag_name[1]) for h in wide.find_elements(By.CSS_SELECTOR, "h1, h2, h3")]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
