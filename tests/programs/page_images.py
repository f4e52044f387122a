"""Images of the page of `virst serve` for docs/serve.md: python tests/programs/page_images.py

Run it from the checkout with PYTHONPATH=.:tests after the page has changed. It needs a Chromium.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from helpers.browser import browser, chromium, wait_until
from helpers.places import ROOT
from helpers.serve_command import virst_serve

IMAGES = ROOT / "docs" / "images"
WAIT = 300_000  # milliseconds; programs are compiled
MAX_BYTES = 300_000


def settle(page: Any) -> None:
    page.wait_for_timeout(1000)
    wait_until(page, "document.getElementById('work').hidden")
    wait_until(page, "document.getElementById('canvas').dataset.frame !== ''")


def begin(page: Any, address: str) -> None:
    page.set_default_timeout(WAIT)
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    while page.locator("#messages button").count():
        page.locator("#messages button").first.click()
    page.click("#sample")
    page.wait_for_selector("#viewer:not([hidden])")


def segmented(page: Any, address: str) -> None:
    """Two sentences, and a box for a third object, tracked."""
    begin(page, address)
    page.fill("#sentences", "the cyan cross\nthe shape that stays still")
    page.click("#run")
    settle(page)
    page.fill("#place", "210, 66, 254, 110")
    page.click("#numbers button")
    settle(page)
    page.click("#track")
    settle(page)
    page.keyboard.press("Home")
    for _ in range(9):
        page.keyboard.press("ArrowRight")
    settle(page)


def main() -> int:
    IMAGES.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as home,
        virst_serve(Path(home)) as (_, address),
        browser(chromium()) as running,
    ):
        page = running.new_page(viewport={"width": 1180, "height": 800})
        segmented(page, address)
        page.screenshot(path=IMAGES / "page.png")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 420, "height": 860})
        settle(page)
        page.evaluate("window.scrollTo(0, 0)")
        page.screenshot(path=IMAGES / "page_narrow.png")
    sizes = {file.name: file.stat().st_size for file in IMAGES.glob("page*.png")}
    print(sizes)
    return int(any(size > MAX_BYTES for size in sizes.values()))


if __name__ == "__main__":
    sys.exit(main())
