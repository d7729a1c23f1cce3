"""The picture of the gallery in the README: the page of a run in a real browser, without a screen.

    python -m benchmarks.gallery_picture RUN docs/images/gallery.png [SKIP]

SKIP images are passed over (by "Another image") before one is painted on; by default none.
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

SIZE = {"width": 1000, "height": 840}
SLOW = 90_000
"""Milliseconds to wait for anything: the machine may be busy."""
STROKES = [(0.35, 0.45, 0.65, 0.45), (0.35, 0.55, 0.65, 0.55)]
"""Of the brush: a bar across the middle."""


def chromium() -> str | None:
    """Where the browser is, if there is one."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


@contextmanager
def browser_page() -> Iterator[Any]:
    """An empty page of a browser, as Playwright has it."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Its sandbox needs rights that containers lack; the page is our own.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page(viewport=SIZE, color_scheme="light")
        page.set_default_timeout(SLOW)
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


def screenshots(url: str, skip: int = 0) -> list[Any]:
    """Samples, and an image that is painted on and filled, as PIL images."""
    from PIL import Image

    taken = []
    with browser_page() as page:
        page.goto(url)
        page.locator("#samples img").wait_for()
        taken.append(page.screenshot(animations="disabled"))
        tab(page, "Inpaint")
        page.locator("#editor canvas").first.wait_for()
        page.wait_for_timeout(3000)  # no sign tells when the canvas takes the brush
        for _ in range(skip):
            page.get_by_role("button", name="Another image").click()
            page.wait_for_timeout(3000)
        paint(page, STROKES)
        page.get_by_role("button", name="Fill").click()
        page.locator("#filled img").wait_for()
        page.mouse.move(0, 0)
        page.evaluate("scrollTo(0, 0)")
        page.wait_for_timeout(1000)
        taken.append(page.screenshot(animations="disabled"))
    return [Image.open(BytesIO(content)).convert("RGB") for content in taken]


def main(run: Path, out: Path, skip: int = 0) -> None:
    """Serves the run, photographs its page, and writes both pictures side by side as a PNG of 256
    colours."""
    from PIL import Image

    from fastdcgan.browsing.serving import serve
    from fastdcgan.browsing.studio import Studio

    with serve(Studio(run)) as url:
        left, right = screenshots(url, skip)
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    both = both.quantize(256, dither=Image.Dither.NONE)
    atomic_write(out, partial(both.save, format="PNG", optimize=True))
    print(f"{out}: {both.width} x {both.height}, {out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:4]))
