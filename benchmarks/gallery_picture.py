"""The picture of the gallery in the README: the page of a run in a real browser, without a screen.

    python -m benchmarks.gallery_picture RUN docs/images/gallery.png

Needs the extra `test` and Chromium, of Debian (`apt-get install chromium`) or any other.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from fastdcgan.data.picture import atomic_write

SIZE = {"width": 1000, "height": 740}


def chromium() -> str | None:
    """Where the browser is, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def open_page(url: str) -> Iterator[Any]:
    """The page at `url`, as Playwright has it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers lack; the page is our own.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.goto(url)
        try:
            yield page
        finally:
            browser.close()


def tab(page: Any, name: str) -> None:
    """Opens one tab."""
    page.get_by_role("tab", name=name).click()


def paint(page: Any, strokes: list[tuple[float, float, float, float]]) -> None:
    """Paints straight strokes (x0, y0, x1, y1) on the canvas, 0 to 1 across the picture."""
    from fastdcgan.browsing.page import CANVAS

    box = page.locator("#editor canvas").first.bounding_box()
    zoom = int(page.locator("#editor").get_by_text("%").inner_text().strip("% \n")) / 100
    side = CANVAS * zoom
    left = box["x"] + (box["width"] - side) / 2
    top = box["y"] + (box["height"] - side) / 2
    for x0, y0, x1, y1 in strokes:
        page.mouse.move(left + x0 * side, top + y0 * side)
        page.mouse.down()
        page.mouse.move(left + x1 * side, top + y1 * side, steps=8)
        page.mouse.up()
