from __future__ import annotations

import importlib
import runpy
import sys

import pytest
from lm_eval.api.registry import get_model
from tokenizers.processors import TemplateProcessing

from loraloom.errors import ConfigError
from loraloom.eval.harness.lm import HostLM, parse_generation
from loraloom.generation.sampling import SamplingConfig
from tests.conftest import build_tokenizer
from tests.eval.harness.toy import instances
from tests.eval.scoring import scoring_host
from tests.generation.saved import save_tiny


@pytest.mark.parametrize(("options", "num_bos"), [({}, 1), ({"add_bos_token": False}, 0)])
def test_bos_stands_in_front_once(options, num_bos):
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    lm = HostLM(scoring_host(configs={}), tokenizer, **options)
    assert lm.tok_encode("the sky").count(1) == num_bos
    assert lm.tok_encode("<bos>the sky").count(1) == 1


@pytest.mark.parametrize(("options", "prefix"), [({}, 1), ({"prefix_token_id": 2}, 2)])
def test_a_prefix_stands_for_an_empty_or_blank_context(options, prefix):
    host, tokenizer = scoring_host(configs={}), build_tokenizer()
    lm = HostLM(host, tokenizer, **options)
    pairs = [("", " yes"), (" ", "yes")]
    (empty, _), (blank, _) = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    rest = tokenizer(" yes")["input_ids"]
    expected = lm._loglikelihood_tokens([(None, [prefix], rest)], disable_tqdm=True)
    assert empty == blank == expected[0][0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"max_new_tokens": 50}),
        ({"until": "\n"}, {"max_new_tokens": 50, "stop": ("\n",)}),
        ({"until": ["a", "", "b", "a"]}, {"max_new_tokens": 50, "stop": ("a", "b")}),
        ({"max_gen_toks": 7}, {"max_new_tokens": 7}),
        ({"max_new_tokens": 8}, {"max_new_tokens": 8}),
        ({"do_sample": False, "temperature": 0.0, "top_p": 0.9}, {"max_new_tokens": 50}),
        ({"do_sample": True}, {"max_new_tokens": 50, "temperature": 1.0}),
        ({"temperature": 0.7}, {"max_new_tokens": 50, "temperature": 0.7}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
            {"max_new_tokens": 50, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
        ),
        (
            {"repetition_penalty": 1.2},
            {"max_new_tokens": 50, "repetition_penalty": 1.2},
        ),
    ],
)
def test_generation_settings_are_read(settings, expected):
    assert parse_generation(settings, 50) == SamplingConfig(**expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 9}, "unknown key 'max_length'"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample draws at a temperature above 0"),
        ({"do_sample": True, "top_p": 2.0}, "top_p"),
    ],
)
def test_generation_that_cannot_be_done_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_generation(settings, 50)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("saved"))


def test_arguments_load_a_model(saved):
    text = f"base_model={saved / 'base'},adapter={saved / 'lora'},max_length=64"
    lm = HostLM.create_from_arg_string(text, {"batch_size": "4", "device": "cpu"})
    assert (lm.adapter, lm.max_length, lm.batch_size) == ("adapter", 64, 4)
    base = HostLM.create_from_arg_obj({"base_model": str(saved / "base"), "device": "cpu"})
    assert (base.adapter, base.max_length) == (None, 256)
    assert get_model("loraloom") is HostLM
    assert get_model("dummy").__name__ == "DummyLM"


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
