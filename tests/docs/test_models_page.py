"""The table of families in docs/models.md is the one in the code, and what tests have tried."""

from __future__ import annotations

from loraloom.models.families import EXPERTS, FAMILIES, Family
from tests.docs.test_blocks import ROOT

TITLES = ("model type", "attention", "FFN block", "trial", "LoRA", "DoRA", "MixLoRA", "MixDoRA")
NAMED = {
    "q_proj k_proj v_proj": "q, k, v",
    "query_key_value": "qkv in one",
    "qkv_proj": "qkv in one",
}


def row(model_type: str, family: Family) -> list[str]:
    """What a type has; tests/models/test_structure.py and test_rows_of_families.py try each."""
    inputs, (output,) = family.attention_inputs
    attention = f"{NAMED[' '.join(inputs)]}, {output.removesuffix('_proj')}"
    mixtures = "yes" if family.ffn_shape != EXPERTS else "no"
    ffn = ", ".join(family.ffn_shape.names) or "experts, left alone"
    return [f"`{model_type}`", attention, ffn, "yes", "yes", "yes", mixtures, mixtures]


def test_the_page_has_the_table_of_families():
    rows = [TITLES, ["---"] * len(TITLES), *(row(*one) for one in FAMILIES.items())]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in rows).replace("| --- ", "|---")
    text = (ROOT / "docs/models.md").read_text()
    _, _, rest = text.partition("<!-- families -->\n")
    assert rest.partition("<!-- /families -->")[0] == table.replace("--- |", "---|")
