"""Runs on quantized bases from the command line: trained, saved, loaded, evaluated, decoded."""

import json
import warnings

import pytest
import yaml

from loraloom.cli import main as cli
from tests.tiny import METHODS
from tests.training.saved import save_inputs

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
    train = {"batch_size": 4, "max_steps": 1, "learning_rate": 5e-3, "max_length": 128}
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
