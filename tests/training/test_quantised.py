"""Runs on quantized bases from the command line: trained, saved, loaded, evaluated, decoded."""

import json
import warnings

import pytest
import torch
import yaml

from loraloom.cli import main as cli
from tests.tiny import METHODS
from tests.training.saved import save_inputs
from tests.training.toy import ADAPTERS, toy_config, toy_engine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")

KINDS = ("nf4", "torchao-int8")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    return save_inputs(tmp_path_factory.mktemp("inputs"), **sizes)


def run_of_all_methods(inputs, output_dir) -> dict:
    train = {"batch_size": 4, "max_steps": 3, "learning_rate": 5e-3, "max_length": 128}
    data = {"dataset": str(inputs / "rows.jsonl"), "format": "instruction"}
    return {
        "base_model": str(inputs / "base"),
        "device": "cpu",
        "output_dir": str(output_dir),
        "jobs": [
            {"name": name, "adapter": config.model_dump(), "data": data, "train": train}
            for name, config in METHODS.items()
        ],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_trains_is_evaluated_and_decodes(inputs, tmp_path, capsys, kind):
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump(run_of_all_methods(inputs, out)))
    assert cli.main(["train", str(file), "--set", f"quantization={kind}"]) == 0
    assert "--quantization" in capsys.readouterr().out
    base = ["--base-model", str(inputs / "base"), "--quantization", kind, "--device", "cpu"]
    for name in METHODS:
        base += ["--adapter", f"{name}={out / name}"]
    asked = ["--task", "arc_easy", "--data", str(inputs), "--scoring", "text"]
    asked += ["--split", "validation", "--no-cache"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the fingerprint is that of training
        assert cli.main(["eval", *base, *asked, "--output", str(out / "eval.json")]) == 0
    evaluated = json.loads((out / "eval.json").read_text())
    assert set(evaluated["results"]) == {"base", *METHODS}
    assert evaluated["quantization"].startswith(("bitsandbytes", "torchao"))
    assert cli.main(["generate", *base, "--prompt", "Say", "--raw", "--max-new-tokens", "3"]) == 0
    for name in METHODS:
        assert json.loads((out / name / "result.json").read_text())["status"] == "finished"


@pytest.mark.parametrize("name", ["adamw_8bit", "ademamix_8bit", "lion_8bit"])
def test_optimizers_of_8_bits_step_and_go_on_after_a_save(tmp_path, name):
    sizes = {"rank": 128}  # bitsandbytes keeps small tensors' states in 32 bits
    config = toy_config("a", ADAPTERS["lora"].model_copy(update=sizes), optimizer=name, max_steps=3)
    engine = toy_engine(tmp_path, [config], dtype=torch.float32)
    engine.step()
    engine.save_state()
    states = list(engine.jobs["a"].learner.optimizer.state.values())
    assert any(state["state1"].dtype == torch.uint8 for state in states)
    again = toy_engine(tmp_path, [config], dtype=torch.float32)
    again.begin(again.directory.checkpoints.newest()[0])
    for one in (engine, again):
        one.step()
    weights = [one.jobs["a"].adapter.tensors().values() for one in (engine, again)]
    assert all(own.equal(other) for own, other in zip(*weights, strict=True))
