"""The run files that come with loraloom are ones that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from loraloom.config.loading import load_run_config

RECIPES = Path(__file__).parents[2] / "recipes"
RUN_FILES = sorted(p for p in RECIPES.rglob("*.yaml") if p.parent.name != "tasks")


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_recipe_is_a_run_file(path):
    assert load_run_config(path).base_model
