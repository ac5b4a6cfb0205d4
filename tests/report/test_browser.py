"""The page in a browser: it asks nothing of the network, fits on phones, and has a dark mode."""

import pytest

from loraloom.report.page import make_page
from tests.report.made import evaluation, write_evaluation, write_run

browsers = pytest.importorskip("tests.report.browser", exc_type=ImportError)

CONTRASTS = """() => {
    const numbers = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = node => {
        for (; node; node = node.parentElement) {
            const color = numbers(getComputedStyle(node).backgroundColor);
            if (color.length === 3 || color[3] > 0) return color;
        }
    };
    const own = node => [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    return [...document.querySelectorAll("body *")].filter(own)
        .filter(node => !node.closest("svg, title")).map(node => {
            const pair = [light(numbers(getComputedStyle(node).color)), light(behind(node))];
            return [(Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05), node.outerHTML];
        }).sort((a, b) => a[0] - b[0])[0];
}"""
"""The least contrast of a text with what is behind it, by WCAG 2's formula."""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """The address of a page of three seeds of four adapters, and names that leave no room."""
    directory = tmp_path_factory.mktemp("report")
    names = ["lora", "dora", "mixlora", "mixdora-with-a-long-name"]
    runs = [write_run(directory / f"seed{seed}", names) for seed in range(3)]
    adapters = [f"{name}@{seed}" for name in names for seed in range(3)]
    tasks = ["arc_easy", "arc_challenge", "boolq", "openbookqa", "piqa"]
    evaluated = write_evaluation(directory / "result.json", evaluation(adapters[::-1], tasks))
    page = directory / "report.html"
    page.write_text(make_page(runs, [evaluated]))
    return page.as_uri()


@pytest.mark.parametrize(("width", "scheme"), [(320, "light"), (1280, "dark")])
def test_the_page_fits_with_everything_unfolded(browser, address, width, scheme):
    with browsers.opened(browser, address, width, scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        headings = page.locator("h1, h2").all_inner_texts()
    assert headings[0] == "seed0, seed1, seed2"
    assert headings[1:] == ["Results", "Jobs", "Learning curves", "Where mixtures send tokens"]


def test_dark_mode_is_dark(browser, address):
    colors = []
    for scheme in ("light", "dark"):
        with browsers.opened(browser, address, 375, scheme) as page:
            colors.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colors == ["rgb(255, 255, 255)", "rgb(21, 22, 26)"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_stand_out(browser, address, scheme):
    with browsers.opened(browser, address, 1280, scheme) as page:
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        contrast, where = page.evaluate(CONTRASTS)
    assert contrast >= 4.5, where
