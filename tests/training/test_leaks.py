"""What runs and evaluations leave in memory: nothing."""

import gc
import shutil
import weakref

import torch

import loraloom
from loraloom.generation import loading
from tests.training.saved import run_settings


def settings(inputs, output_dir):
    run = run_settings(inputs, output_dir)
    for job in run["jobs"]:
        job["train"] |= {"max_steps": 1, "eval_steps": 1}
    return run


def num_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def test_a_run_and_an_evaluation_leave_no_tensor_behind(inputs, tmp_path):
    model, tokenizer = loraloom.load_base_model(str(inputs / "base"))
    host = loraloom.attach(model)
    counts = []
    for _ in range(3):
        loraloom.train(settings(inputs, tmp_path / "out"), base=(host, tokenizer))
        host.load("mixture", tmp_path / "out/mixture")
        loraloom.evaluate(host, tokenizer, "arc_easy", data=inputs, split="validation")
        host.remove("mixture")
        shutil.rmtree(tmp_path / "out")
        counts.append(num_tensors())
    assert counts[1] == counts[2]


def test_a_base_model_goes_with_its_run(inputs, tmp_path, monkeypatch):
    loaded = []

    def attach(model):
        host = loraloom.attach(model)
        loaded.extend([weakref.ref(host), weakref.ref(model)])
        return host

    monkeypatch.setattr(loading, "attach", attach)
    loraloom.train(settings(inputs, tmp_path / "out"))
    gc.collect()
    assert [reference() for reference in loaded] == [None, None]
