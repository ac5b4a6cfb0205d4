"""The run files and scripts that come with loraloom are ones that it takes."""

from __future__ import annotations

import runpy
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from loraloom.eval.statistics import choose_pairs
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


@pytest.mark.parametrize("seeds", [(0, 1, 2), (0,)])
def test_the_small_recipe_compares_adapters_that_it_scores(seeds, tmp_path, monkeypatch):
    recipe = runpy.run_path(str(RECIPES / "small" / "run.py"))
    command: list[str] = []
    monkeypatch.setitem(recipe["evaluate"].__globals__, "run", lambda *args: command.extend(args))
    methods = list(recipe["JOBS"])
    args = Namespace(output=tmp_path, base_model="base", data=tmp_path, methods=methods)
    recipe["evaluate"](args, seeds, tmp_path / "scores")
    names, pairs = (
        [part.split("=")[1] for part in command if part.startswith(option)]
        for option in ("--adapter=", "--compare=")
    )
    assert len(choose_pairs([None, *names], pairs)) == len(pairs)
