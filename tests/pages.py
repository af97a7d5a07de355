"""A page in Chromium: opened, its table read and sorted, its texts measured."""

from pathlib import Path

from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

# WCAG 2.1: the ratio of luminances of text and what lies behind it, where it is below 4.5.
LOW_CONTRAST = """
const channel = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
const light = (c) => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
const numbers = (text) => { const n = text.match(/[\\d.]+/g).map(Number);
  return n.length === 4 ? n : [...n, 1]; };
const behind = (element) => {
  if (!element) return [255, 255, 255];
  const [r, g, b, a] = numbers(getComputedStyle(element).backgroundColor);
  if (a === 1) return [r, g, b];
  const under = behind(element.parentElement);
  return [r, g, b].map((c, i) => a * c + (1 - a) * under[i]);
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const low = [];
while (walker.nextNode()) {
  const node = walker.currentNode, element = node.parentElement;
  if (!node.textContent.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  const pair = [light(numbers(getComputedStyle(element).color)), light(behind(element))].sort();
  const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  if (ratio < 4.5) low.push(node.textContent + " " + ratio.toFixed(2));
}
return low;
"""


def open_page(browser: Chrome, page: Path) -> None:
    """Open a file; what earlier pages said on the console is forgotten."""
    browser.get_log("browser")
    browser.get(page.resolve().as_uri())


def rows(browser: Chrome) -> list[WebElement]:
    found = browser.find_elements(By.CSS_SELECTOR, "table.predictions tbody tr")
    return [row for row in found if row.is_displayed()]


def column(browser: Chrome, number: int) -> list[str]:
    return [row.find_elements(By.CSS_SELECTOR, "td, th")[number].text for row in rows(browser)]


def press(browser: Chrome, title: str) -> str | None:
    [button] = [
        button
        for button in browser.find_elements(By.CSS_SELECTOR, "table.predictions thead button")
        if button.text.startswith(title)
    ]
    button.click()
    return button.find_element(By.XPATH, "..").get_attribute("aria-sort")


def control(browser: Chrome, name: str) -> WebElement:
    return browser.find_element(By.NAME, name)


def narrow_width(browser: Chrome, page: Path) -> int:
    """How wide the page is on a screen of 360 px."""
    browser.set_window_size(500, 800)
    open_page(browser, page)
    # Chromium's window is never narrower than 500 px; the page is, in a frame of 360 px.
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True},
    )
    try:
        width, inside = browser.execute_script(
            "return [document.documentElement.scrollWidth, window.innerWidth]"
        )
        assert inside == 360
        return int(width)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
