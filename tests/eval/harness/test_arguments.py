from __future__ import annotations

import importlib
import runpy
import sys

import lm_eval
import pytest
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from loraloom.errors import ConfigError
from loraloom.eval.harness import HostLM, load_tasks
from tests.generation.saved import save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("saved"))


def test_lm_eval_knows_the_model_and_its_own_ones():
    assert get_model("loraloom") is HostLM
    assert get_model("dummy").__name__ == "DummyLM"


def test_arguments_load_a_model(saved):
    text = f"base_model={saved / 'base'},adapter={saved / 'lora'},max_length=64"
    lm = HostLM.create_from_arg_string(text, {"batch_size": "4", "device": "cpu"})
    assert (lm.adapter, lm.max_length, lm.batch_size) == ("adapter", 64, 4)
    base = HostLM.create_from_arg_obj({"base_model": str(saved / "base"), "device": "cpu"})
    assert (base.adapter, base.max_length) == (None, 256)


def test_simple_evaluate_takes_the_models_name(saved, toy_tasks):
    results = lm_eval.simple_evaluate(
        model="loraloom",
        model_args=f"base_model={saved / 'base'},adapter={saved / 'lora'},device=cpu",
        tasks=load_tasks(["toy_choice"], toy_tasks),
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["toy_choice"]["sample_len"] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "base_model must be given"),
        ({"base_model": "m", "adaptor": "a"}, "did you mean 'adapter'"),
    ],
)
def test_wrong_arguments_are_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        HostLM.create_from_arg_obj(arguments)


@pytest.mark.slow
def test_lm_evals_command_line_knows_the_model(saved, toy_tasks, monkeypatch, capsys):
    arguments = f"base_model={saved / 'base'},adapter={saved / 'mixlora'},device=cpu"
    words = f"--model loraloom --model_args {arguments} --include_path {toy_tasks} --limit 2"
    monkeypatch.setattr(sys, "argv", ["lm-eval", *words.split(), "--tasks", "toy_choice"])
    with pytest.raises(SystemExit) as done:
        runpy.run_module("loraloom.eval.harness", run_name="__main__")
    assert not done.value.code
    assert "toy_choice" in capsys.readouterr().out


def test_a_missing_lm_eval_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "loraloom.eval.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"run: pip install 'loraloom\[eval\]'"):
        importlib.import_module("loraloom.eval.harness")
