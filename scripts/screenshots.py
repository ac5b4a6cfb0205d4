"""Pictures of a page for the documentation: two widths, light and dark.

python -m scripts.screenshots runs/arc/report.html --output docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.report.browser import chromium, opened

SHOTS = {
    "results": (1280, "light", "#results"),
    "curves": (1280, "dark", "#curves"),
    "experts": (375, "light", ".heat >> nth=1"),
    "text": (375, "dark", ".text >> nth=0"),
}
"""Name -> width, color scheme, and what is at the top."""


def main() -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for name, (width, scheme, selector) in SHOTS.items():
            with opened(browser, options.page, width, scheme) as page:
                page.locator(selector).evaluate("one => one.scrollIntoView()")
                path = options.output / f"report-{name}.png"
                page.screenshot(path=path)
                print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
