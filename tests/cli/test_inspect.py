from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.cli.inspect import inspect
from loraloom.formats import write_adapter
from tests.formats.tiny import llama_base, make_tensors


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(inspect)
    return app


def save(directory, config):
    base = llama_base()
    write_adapter(directory, config, make_tensors(config, base), base)


def test_inspect_shows_method_sizes_and_norms(app, tmp_path):
    save(tmp_path, MixLoraConfig(rank=4, alpha=8, num_experts=4, top_k=2))
    result = CliRunner().invoke(app, [str(tmp_path)], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for text in ("MixLoRA", "4, top-2", "% of the base model", "mlp.router", "mlp experts"):
        assert text in result.output


def test_inspect_prints_json(app, tmp_path):
    save(tmp_path, LoraConfig(rank=4, alpha=8, target_modules="attention"))
    result = CliRunner().invoke(app, [str(tmp_path), "--json"])
    shown = json.loads(result.output)
    assert shown["method"] == "LoRA"
    assert shown["experts"] is None
    assert shown["num_parameters"] == sum(shown["parameters"].values())
    assert shown["percent_of_base"] == pytest.approx(shown["num_parameters"] / 1000)
