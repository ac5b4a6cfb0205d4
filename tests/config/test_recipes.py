"""The run files and scripts that come with loraloom are ones that it takes."""

import runpy
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from loraloom.training.settings import JobConfig, load_run_config

RECIPES = Path(__file__).parents[2] / "recipes"
SOURCES = [RECIPES / "apart" / f"{name}.yaml" for name in ("halves", "lands", "quarter", "tasks")]
OF_PLUG_INS = RECIPES / "methods" / "recent.yaml"
RUN_FILES = {p for p in RECIPES.rglob("*.yaml") if p.parent.name != "tasks"}
RUN_FILES = sorted(RUN_FILES - {*SOURCES, OF_PLUG_INS})


@pytest.mark.parametrize("path", RUN_FILES, ids=lambda path: str(path.relative_to(RECIPES)))
def test_a_recipe_is_a_run_file(path):
    assert load_run_config(path).base_model


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_sources_make_jobs(path, tmp_path):
    recipe, of = runpy.run_path(str(RECIPES / "apart" / "run.py")), yaml.safe_load(path.read_text())
    args = Namespace(of=of, output=tmp_path)
    for kind in ("apart", *of["jobs"]):
        for job in recipe["jobs_of"](args, kind, 0):
            assert JobConfig.model_validate(job).name
