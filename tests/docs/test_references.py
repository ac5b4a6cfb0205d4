"""Links lead somewhere, and pages name all that is public, and all families."""

import ast
import inspect
import re
from pathlib import Path

import pytest

from loraloom.base.families import FAMILIES
from loraloom.generation.engine import Engine
from tests.docs.test_blocks import DOCUMENTS, ROOT


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_links_lead_to_files_and_headings_that_exist(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / document).read_text()):
        path, _, heading = target.partition("#")
        if "://" in path:
            continue
        file = (ROOT / document).parent / path if path else ROOT / document
        assert file.exists(), f"{document}: {target}"
        if heading:
            assert heading in headings(file.read_text()), f"{document}: {target}"


def headings(text: str) -> set[str]:
    """The anchors of a document, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_page_of_models_lists_the_families_that_tests_know():
    _, _, rest = (ROOT / "docs/models.md").read_text().partition("<!-- families -->\n")
    assert rest.partition("\n<!-- /families -->")[0] == ", ".join(f"`{one}`" for one in FAMILIES)


def test_the_page_of_operations_lists_all_metrics():
    folders = ("src/loraloom/generation", "src/loraloom/serve/http")
    source = "".join(
        map(Path.read_text, (file for at in folders for file in (ROOT / at).glob("*.py")))
    )
    counters = {f"{name}_total" for name in re.findall(r'counts\["(\w+)"', source)}
    histograms = set(re.findall(r'"loraloom_(\w+_seconds)"', source))
    gauges = set(re.findall(r'"(\w+)":', inspect.getsource(Engine.gauges)))
    page = (ROOT / "docs/reference/operations.md").read_text()
    listed = re.findall(r"^\| `loraloom_(\w+)` \|", page, re.MULTILINE)
    assert sorted(listed) == sorted(counters | histograms | gauges)


def test_headings_of_troubleshooting_are_messages_of_the_code():
    texts = "\n".join(
        str(node.value)
        for file in (ROOT / "src").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    page = (ROOT / "docs/troubleshooting.md").read_text().replace("smollm2-135m comes", "… comes")
    parts = "\n".join(re.findall(r"^### (.*)$", page, re.MULTILINE)).replace("\n", "…").split("…")
    assert len(parts) > 30
    assert [part for part in parts if part.strip() not in texts] == []
