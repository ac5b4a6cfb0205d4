"""The site has every page, and its reference has every public name."""

import re
from importlib.util import module_from_spec, spec_from_file_location

import loraloom
from loraloom.serve.http import guards
from loraloom.training.workers import _QUIET
from tests.docs.test_blocks import ROOT

DOCS = ROOT / "docs"
SPEC = spec_from_file_location("reference", ROOT / "scripts/reference.py")
SET_FOR_OTHERS = {*_QUIET, "VLLM_ALLOW_RUNTIME_LORA_UPDATING"}


def test_generated_pages_are_current():
    reference = module_from_spec(SPEC)
    SPEC.loader.exec_module(reference)
    for name, text in reference.pages().items():
        written = (DOCS / "reference" / name).read_text()
        assert text == written, f"{name}: run .venv/bin/python scripts/reference.py"


def test_the_navigation_has_every_page():
    listed = re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_each_public_name_has_an_entry_and_an_example():
    found = {}
    for page in DOCS.glob("reference/python/*.md"):
        text = page.read_text()
        code = "".join(re.findall(r"```python(.*?)```", text, re.DOTALL))
        for name in re.findall(r"^::: loraloom\.(.*)$", text, re.MULTILINE):
            found[name] = re.search(rf"\b{name}\b", code)
    assert sorted(found) == loraloom.__all__
    assert [name for name, example in found.items() if not example] == []


def test_operations_names_the_variables_and_codes_of_the_source():
    files = [file.read_text() for file in (ROOT / "src").rglob("*.py")]
    found = {*guards._STATUS}
    for text in (text for text in files if "environ" in text):
        found |= {*re.findall(r'"([A-Z]+(?:_[A-Z]+)+)"', text)}
    page = (DOCS / "reference/operations.md").read_text()
    assert [name for name in sorted(found - SET_FOR_OTHERS) if f"`{name}`" not in page] == []
