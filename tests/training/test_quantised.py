"""Runs on quantised bases from the command line: trained, saved, loaded, evaluated, decoded."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file

import loraloom
from loraloom.cli import main as cli
from loraloom.config.model import parse_quantization, quantization_option
from loraloom.errors import ConfigError
from loraloom.training.step.optimizers import BITSANDBYTES
from tests.tiny import METHODS
from tests.training.saved import save_inputs
from tests.training.toy import ADAPTERS, toy_config, toy_engine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")

KINDS = ("nf4", "int8", "torchao-int8")


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
    assert cli.main(["train", str(file), "--quantization", kind]) == 0
    assert f"--quantization {kind}" in capsys.readouterr().out
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


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(inputs, tmp_path):
    def settings(out):
        run = run_of_all_methods(inputs, tmp_path / out) | {"quantization": "nf4"}
        run["jobs"] = [run["jobs"][0], run["jobs"][-1]]
        for job in run["jobs"]:
            job["train"] = {**job["train"], "save_steps": 1}
        return run

    def stop(engine, _):
        if engine.round == 2:
            raise KeyboardInterrupt

    loraloom.train(settings("whole"))
    with pytest.raises(KeyboardInterrupt):
        loraloom.train(settings("broken"), between_steps=stop)
    loraloom.train(settings("broken"), resume=True)
    for name in ("lora", "mixdora"):
        whole, broken = (
            load_file(tmp_path / out / name / "adapter_model.safetensors")
            for out in ("whole", "broken")
        )
        assert all(tensor.equal(broken[key]) for key, tensor in whole.items())


def test_a_run_on_another_quantisation_is_not_resumed(inputs, tmp_path):
    settings = run_of_all_methods(inputs, tmp_path / "out")
    settings["jobs"] = settings["jobs"][:1]
    loraloom.train(settings | {"quantization": "nf4"})
    with pytest.raises(ConfigError, match="base quantization"):
        loraloom.train(settings | {"quantization": "torchao-int8"}, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["quantization=nf5"], "quantization must be nf4, int8"),
        (["quantization.load_in_4bit=true", "quantization.bnb_4bit_compute_dtype=float16"], "loss"),
        (["quantization=torchao-int4", "dtype=float32"], "computes in bfloat16 only"),
        (["quantization=torchao-int4"], "needs a CUDA device"),
        (["jobs.0.train.optimizer=paged_adamw_8bit"], "take adamw_8bit"),
    ],
)
def test_a_fault_ends_the_command_before_anything_is_loaded(
    inputs, tmp_path, capsys, monkeypatch, settings, message
):
    monkeypatch.setattr("loraloom.models.loading._load", lambda *_: pytest.fail("must not load"))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(run_of_all_methods(inputs, tmp_path / "out")))
    changes = [word for setting in settings for word in ("--set", setting)]
    assert cli.main(["train", str(file), *changes]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["nf4", {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}])
def test_the_option_that_is_written_gives_the_same_quantisation(value):
    asked = parse_quantization(value)
    _, _, text = quantization_option(asked).partition(" ")
    assert parse_quantization(text.strip("'")) == asked


@pytest.mark.parametrize("name", [name for name in BITSANDBYTES if "paged" not in name])
def test_optimizers_of_8_bits_step_and_go_on_after_a_save(tmp_path, name):
    sizes = {"rank": 128}  # bitsandbytes keeps small tensors' states in 32 bits
    config = toy_config("a", ADAPTERS["lora"].model_copy(update=sizes), optimizer=name, max_steps=3)
    engine = toy_engine(tmp_path, [config], dtype=torch.float32)
    engine.step()
    engine.save_state()
    states = list(engine.jobs["a"].optimizer.state.values())
    assert any(state["state1"].dtype == torch.uint8 for state in states)
    again = toy_engine(tmp_path, [config], dtype=torch.float32)
    again.load_state(again._directory.checkpoints.newest()[0])
    for one in (engine, again):
        one.step()
    weights = [one.jobs["a"].adapter.tensors().values() for one in (engine, again)]
    assert all(own.equal(other) for own, other in zip(*weights, strict=True))


def test_8_bits_of_state_follow_32_bits(tmp_path):
    def trained(name):
        config = toy_config(
            "a", ADAPTERS["lora"].model_copy(update={"rank": 128}), optimizer=name, max_steps=4
        )
        engine = toy_engine(tmp_path / name, [config], dtype=torch.float32)
        start = {key: tensor.clone() for key, tensor in engine.jobs["a"].adapter.tensors().items()}
        for _ in range(4):
            engine.step()
        tensors = engine.jobs["a"].adapter.tensors()
        return torch.cat([(tensors[key] - start[key]).flatten() for key in start])

    exact, rounded = trained("adamw"), trained("adamw_8bit")
    assert float(torch.cosine_similarity(exact, rounded, dim=0)) > 0.99
