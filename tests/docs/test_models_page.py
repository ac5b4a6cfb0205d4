"""The list of families in docs/models.md is the one in the code."""

from __future__ import annotations

from loraloom.models.structure import FAMILIES
from tests.docs.test_blocks import ROOT


def test_the_page_lists_the_families_that_tests_know():
    text = (ROOT / "docs/models.md").read_text()
    _, _, rest = text.partition("<!-- families -->\n")
    assert rest.partition("\n<!-- /families -->")[0] == ", ".join(f"`{one}`" for one in FAMILIES)
