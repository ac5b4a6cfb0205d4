from __future__ import annotations

from typing import Annotated

import pytest
from cyclopts import Parameter

from loraloom.cli import main as cli
from loraloom.cli.options import HostOptions, LocalPaths, parse_adapters
from loraloom.errors import ConfigError

SEEN = {}


def load(
    paths: LocalPaths | None = None, /, *, model: Annotated[HostOptions, Parameter(name="*")]
) -> None:
    """A verb with every shared option."""
    SEEN.update(model.model_dump() | {"adapters": model.adapters, "paths": paths})
    SEEN["quantization"] = model.quantization


@pytest.fixture
def verb(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "load", (load, "Load."))
    SEEN.clear()
    return lambda *argv: cli.main(["load", *argv])


def test_options_have_defaults(verb):
    assert verb("--base-model", "smollm2-135m") == 0
    assert SEEN == {
        "base_model": "smollm2-135m",
        "adapter": (),
        "adapters": {},
        "dtype": "auto",
        "device": "auto",
        "attn_implementation": None,
        "quantization": None,
        "paths": None,
    }


def test_options_are_read(verb):
    words = "a b --base-model m --adapter a=x --adapter b=y/z=1 --dtype bfloat16 --device cuda:0"
    assert verb(*words.split(), "--attn-implementation", "eager") == 0
    assert SEEN["adapters"] == {"a": "x", "b": "y/z=1"}
    assert (SEEN["dtype"], SEEN["device"]) == ("bfloat16", "cuda:0")
    assert SEEN["attn_implementation"] == "eager"
    assert [*map(str, SEEN["paths"])] == ["a", "b"]


def test_of_an_option_given_twice_the_later_counts(verb):
    assert verb("--base-model", "m", "--device=cpu", "--base-model=n", "--device", "cuda") == 0
    assert (SEEN["base_model"], SEEN["device"]) == ("n", "cuda")


@pytest.mark.parametrize(
    ("text", "quant_type"),
    [("nf4", "nf4"), ("{load_in_4bit: true, bnb_4bit_quant_type: fp4}", "fp4")],
)
def test_a_quantisation_is_a_name_or_settings(verb, text, quant_type):
    assert verb("--base-model", "m", "--quantization", text) == 0
    assert SEEN["quantization"].bnb_4bit_quant_type == quant_type


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dtype flaot32", "did you mean 'float32'?"),
        ("--device gpu", "error: device must be auto, cpu, cuda"),
        ("--attn-implementation flash", "sdpa"),
        ("--adapter a", "error: --adapter must be name=path, got 'a'"),
        ("--quantization 4", "error: quantization must be nf4, int8"),
        ("--quantization {load_in_4bit:", "error: quantization must be valid YAML"),
        ("--devcie cpu", "Did you mean --device?"),
        (f"a {300 * 'x'}", "error: the path must be a path, got"),
        ("~nosuchuser/x", "error: the path must be a path, got '~nosuchuser/x'"),
    ],
)
def test_a_wrong_option_is_code_2(verb, capsys, words, message):
    assert verb("--base-model", "m", *words.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["law"], "--adapter must be name=path, got 'law'"),
        (["=x"], "--adapter must be name=path"),
        (["law="], "--adapter must be name=path"),
        (["a/b=x"], "--adapter a/b=x: name must be a safe file name"),
        (["base=x"], "name must differ from base"),
        (["a=x", "a=y"], "from other adapters' names"),
    ],
)
def test_an_adapter_option_that_is_no_such_pair_is_refused(texts, message):
    with pytest.raises(ConfigError, match=message):
        parse_adapters(texts)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["report", ".", "--eval", "a.json", "--eval", 300 * "x"], "--eval"),
        (["train", "run.yaml", "--watch", 300 * "x"], "watch"),
    ],
)
def test_a_path_that_can_not_exist_is_code_2_and_named(argv, name, capsys):
    assert cli.main(argv) == 2
    assert f"error: {name} must be a path, got" in capsys.readouterr().err
