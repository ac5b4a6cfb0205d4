"""A page in Chromium, where the machine has one."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from playwright.sync_api import Browser, Page, sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class NoChromium(SystemExit):
    """There is no browser here."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Run a browser, $CHROMIUM before those on the PATH.

    Raises:
        NoChromium: If there is none.
    """
    executable = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if executable is None:
        raise NoChromium("no Chromium on this machine; install one, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def opened(
    browser: Browser,
    address: str,
    width: int = 1280,
    scheme: str = "light",
    expected: Sequence[str] = (),
) -> Iterator[Page]:
    """Open a page; what it asks of others is an error, as are complaints but for some statuses."""
    page = browser.new_page(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda one: one.url.startswith(address) or faults.append(one.url))
    page.goto(address)
    try:
        yield page
    finally:
        page.close()
    assert [text for text in faults if not any(status in text for status in expected)] == []
