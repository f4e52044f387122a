"""A Chromium that is installed, driven by Playwright."""

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

NEEDED = "VIRST_NEEDS_BROWSER"  # set where a missing browser is a failure, as in .ci/run
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def chromium() -> str:
    """Its path. Skips the test if there is none, or fails it where there must be one."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is not None:
        return found
    reason = f"no Chromium is installed ({', '.join(NAMES)}); on Debian: apt-get install chromium"
    if os.environ.get(NEEDED):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def browser(path: str) -> Iterator[Any]:
    """Playwright's Browser."""
    from playwright.sync_api import sync_playwright

    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=[*sandbox, "--disable-dev-shm-usage"])
        try:
            yield running
        finally:
            running.close()


def wait_until(page: Any, true: str, seconds: float = 240) -> None:
    """Waits for an expression of JavaScript. Playwright's wait_for_function needs a policy that allows eval."""
    end = time.monotonic() + seconds
    while not page.evaluate(true):
        assert time.monotonic() < end, true
        time.sleep(0.05)
