"""Pictures of the playground for the documentation: two widths, light and dark.

python -m tests.serve.screenshots http://127.0.0.1:8000 --models smollm2-135m lora mixlora
"""

from __future__ import annotations

import argparse
from pathlib import Path

from playwright.sync_api import Browser

from tests.report.browser import chromium

SHOTS = {"wide": (1100, 820, "light"), "phone": (375, 820, "dark")}
"""Name -> width, height and color scheme."""


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", help="of a running server")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--prompt", default="What is the capital of France?")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name in SHOTS:
            take(browser, name, options)


def take(browser: Browser, name: str, options: argparse.Namespace) -> None:
    """Ask the models, and take a picture of their answers."""
    width, height, scheme = SHOTS[name]
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme="dark" if scheme == "dark" else "light",
    )
    page.goto(options.address)
    page.locator("#models input").first.wait_for()
    for box in page.locator("#models input").all():
        box.set_checked(box.get_attribute("value") in options.models)
    page.get_by_label("Prompt", exact=True).fill(options.prompt)
    page.get_by_text("Settings").click()
    page.get_by_label("Most tokens").fill("48")
    page.get_by_text("Settings").click()
    page.keyboard.press("Control+Enter")
    page.locator("#answers article").first.wait_for()
    page.locator("#stop:disabled").wait_for(timeout=600_000)
    page.locator("#answers article").last.locator(".text span").nth(2).hover()
    if width < 500:
        page.locator("#answers article").last.evaluate("one => one.scrollIntoView()")
    path = options.output / f"playground-{name}.png"
    page.screenshot(path=path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")
    page.close()


if __name__ == "__main__":
    main()
