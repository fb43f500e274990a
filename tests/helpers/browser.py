"""A headless Chromium for tests, through Playwright: Debian's own, which needs no download.

with open_browser() as browser:
    page = watch(browser.new_page())
    ...
    assert not page_problems(page)
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
NAMES = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Path of an installed Chromium."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def missing() -> str | None:
    """Why no browser can be started here; None if one can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "Playwright is not installed (pip install playwright)"
    return None if find_browser() else "Chromium is not installed (apt install chromium)"


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A browser of Playwright's synchronous interface."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


class Watch:
    """What a page did that it should not: dialogs, errors in its scripts, messages in its console, requests to other
    origins than `origin`."""

    def __init__(self, page: Any, origin: str):
        self.problems: list[str] = []
        self._origin = origin
        page.on("dialog", self._see_dialog)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", self._see_message)
        page.on("request", self._see_request)

    def _see_dialog(self, dialog: Any) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _see_message(self, message: Any) -> None:
        # the browser itself reports every answer of 400 and more
        if not message.text.startswith("Failed to load resource"):
            self.problems.append(f"{message.type}: {message.text}")

    def _see_request(self, request: Any) -> None:
        if not request.url.startswith((self._origin, "blob:" + self._origin)):
            self.problems.append(f"request: {request.url}")
