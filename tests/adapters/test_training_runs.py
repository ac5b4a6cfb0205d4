"""Run files with the methods that work on each projection: fused, alone, killed and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loraloom
from loraloom.training.engine import Engine
from tests.tiny import ALL_METHODS, relative_error
from tests.training.saved import save_inputs, write_run_file

NEW = ("vera", "hydralora", "mola")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))


def run_of(inputs: Path, output_dir: Path, names: tuple[str, ...] = NEW) -> Path:
    """Write a run file with a job for each method, three steps of other sizes."""
    jobs = [
        {
            "name": name,
            "seed": seed,
            "adapter": {**ALL_METHODS[name].model_dump(mode="json"), "dropout": 0.1},
            "data": {"dataset": str(inputs / "rows.jsonl"), "format": "instruction"},
            "train": {
                "batch_size": 4 + 2 * seed,
                "micro_batch_size": 2 + seed,
                "max_steps": 3,
                "learning_rate": 1e-2,
                "lr_scheduler": "constant",
                "max_length": 64,
                "save_steps": 1,
                "weight_decay": 0.01,
            },
        }
        for seed, name in enumerate((*NEW, "lora"))
        if name in names
    ]
    settings = {
        "base_model": str(inputs / "base"),
        "device": "cpu",
        "output_dir": str(output_dir),
        "jobs": jobs,
    }
    return write_run_file(output_dir.with_suffix(".yaml"), settings)


def weights(directory: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {path.parent.name: load_file(path) for path in directory.glob("*/*.safetensors")}


def test_a_killed_run_goes_on_to_the_weights_of_an_unbroken_one(inputs, tmp_path, monkeypatch):
    loraloom.train(run_of(inputs, tmp_path / "unbroken"))
    step = Engine.step

    def stepping(engine):
        if engine.round == 2:
            raise RuntimeError("killed")
        step(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", stepping)
        with pytest.raises(RuntimeError, match="killed"):
            loraloom.train(run_of(inputs, tmp_path / "out"))
    results = loraloom.train(run_of(inputs, tmp_path / "out"), resume=True)
    assert [(result.status, result.steps) for result in results] == [("finished", 3)] * 3
    assert [result.method for result in results] == ["VeRA", "HydraLoRA", "MoLA"]
    expected, actual = weights(tmp_path / "unbroken"), weights(tmp_path / "out")
    assert actual.keys() == expected.keys() == set(NEW)
    for name, tensors in actual.items():
        assert all(torch.equal(tensors[key], value) for key, value in expected[name].items())


def test_jobs_that_share_steps_train_as_they_do_alone(inputs, tmp_path):
    loraloom.train(run_of(inputs, tmp_path / "fused", (*NEW, "lora")))
    fused = weights(tmp_path / "fused")
    for name in NEW:
        loraloom.train(run_of(inputs, tmp_path / name, (name,)))
        for key, tensor in weights(tmp_path / name)[name].items():
            assert relative_error(fused[name][key], tensor) < 1e-4, key


def test_trained_adapters_load_and_have_their_losses_logged(inputs, tmp_path):
    loraloom.train(run_of(inputs, tmp_path))
    model, tokenizer = loraloom.load_base_model(str(inputs / "base"))
    host = loraloom.attach(model)
    ids = tokenizer("Say blue", return_tensors="pt").input_ids
    base = host(ids).logits
    for name in NEW:
        host.load(name, tmp_path / name)
        assert not torch.allclose(host(ids, adapters=[name]).logits, base)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps = [json.loads(line) for line in lines]
        assert [step["step"] for step in steps] == [1, 2, 3]
        assert all(step["aux_loss"] > 0 for step in steps) is (name == "mola")
        assert all("router/load_cv" in step for step in steps) is (name != "vera")
        assert ALL_METHODS[name].title in (tmp_path / name / "README.md").read_text()
