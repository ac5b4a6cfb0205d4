import json

import pytest

from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.cli.main import main
from loraloom.formats import write_adapter
from tests.formats.tiny import llama_base, make_tensors


def save(directory, config):
    base = llama_base()
    write_adapter(directory, config, make_tensors(config, base), base)


def test_inspect_shows_method_and_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    save(tmp_path, MixLoraConfig(rank=4, alpha=8, num_experts=4, top_k=2))
    assert main(["inspect", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for text in ("MixLoRA", '"num_experts": 4', "percent of base", "mlp experts"):
        assert text in printed


def test_inspect_prints_json(tmp_path, capsys):
    save(tmp_path, LoraConfig(rank=4, alpha=8, target_modules="attention"))
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["method"] == "LoRA"
    assert shown["settings"]["alpha"] == 8
    assert shown["num_parameters"] == sum(shown["parameters"].values())
    assert shown["percent_of_base"] == pytest.approx(shown["num_parameters"] / 1000)
