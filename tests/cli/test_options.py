from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from loraloom.cli import main as cli
from loraloom.cli.options import (
    AdapterOption,
    AttnOption,
    BaseModelOption,
    DeviceOption,
    DtypeOption,
    QuantizationOption,
    parse_adapter,
    parse_adapters,
)
from loraloom.errors import ConfigError, LoraloomError

SEEN = {}


def load(
    base_model: BaseModelOption,
    adapter: AdapterOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    attn_implementation: AttnOption = None,
    quantization: QuantizationOption = None,
) -> None:
    """A verb with every shared option."""
    SEEN.update(
        base_model=base_model,
        adapters=parse_adapters(adapter),
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        quantization=quantization,
    )


@pytest.fixture
def verb(monkeypatch):
    assert get_type_hints(load)
    monkeypatch.setitem(cli.VERBS, "load", load)
    SEEN.clear()
    return lambda *argv: cli.main(["load", *argv])


def test_options_have_defaults(verb):
    assert verb("--base-model", "smollm2-135m") == 0
    assert SEEN == {
        "base_model": "smollm2-135m",
        "adapters": {},
        "dtype": "float32",
        "device": "auto",
        "attn_implementation": None,
        "quantization": None,
    }


def test_options_are_read(verb):
    words = "--base-model m --adapter a=x --adapter b=y/z=1 --dtype bfloat16 --device cuda:0"
    assert verb(*words.split(), "--attn-implementation", "eager") == 0
    assert SEEN["adapters"] == {"a": "x", "b": "y/z=1"}
    assert (SEEN["dtype"], SEEN["device"]) == ("bfloat16", "cuda:0")
    assert SEEN["attn_implementation"] == "eager"


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
        ("--dtype float64", "float32"),
        ("--device gpu", "error: device must be auto, cpu, cuda"),
        ("--attn-implementation flash", "sdpa"),
        ("--adapter a", "error: --adapter must be name=path, got 'a'"),
        ("--quantization 4", "error: quantization must be nf4, int8"),
        ("--quantization {load_in_4bit:", "error: quantization must be valid YAML"),
    ],
)
def test_a_wrong_option_is_code_2(verb, capsys, words, message):
    assert verb("--base-model", "m", *words.split()) == 2
    assert message in capsys.readouterr().err


def test_an_adapter_is_a_name_and_a_path():
    assert parse_adapter("law=out/law") == ("law", "out/law")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("law", "--adapter must be name=path, got 'law'"),
        ("=x", "--adapter must be name=path"),
        ("law=", "--adapter must be name=path"),
        ("a/b=x", "--adapter a/b=x: name must be a safe file name"),
        ("base=x", "name must not be base"),
    ],
)
def test_an_adapter_option_that_is_no_such_pair_is_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_adapter(text)


def test_a_name_given_twice_is_refused():
    with pytest.raises(ConfigError, match="name must not be given twice, got 'a' again"):
        parse_adapters(["a=x", "a=y"])


def commands():
    groups = [cli.VERBS, *(group for _, group in cli.GROUPS.values())]
    return [command for group in groups for command in group.values()]


def is_a_path(hint):
    return hint is Path or any(map(is_a_path, get_args(hint)))


def test_every_path_of_every_command_is_one_that_the_system_can_be_asked_about():
    checked = []
    for command in commands():
        for name, hint in get_type_hints(command, include_extras=True).items():
            if is_a_path(hint):
                _, parameter = get_args(hint)
                assert parameter.parser is not None, f"{command.__name__}: {name}: path_option"
                assert parameter.parser("a/b") == Path("a/b")
                words = (parameter.default, *(parameter.param_decls or ()), parameter.metavar)
                shown = next(word for word in words if isinstance(word, str))
                with pytest.raises(LoraloomError, match=f"{shown} must be a path, got '~nosuch"):
                    parameter.parser("~nosuchuser/x")
                checked.append(name)
    assert {"run_file", "watch", "output", "run_dirs", "picture"} <= set(checked)


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (["report", 300 * "x"], "RUN_DIR..."),
        (["config", "show", 300 * "x"], "RUN.yaml"),
        (["report", ".", "--eval", "a.json", "--eval", 300 * "x"], "--eval"),
        (["train", "run.yaml", "--watch", 300 * "x"], "--watch"),
    ],
)
def test_a_path_that_can_not_exist_is_code_2_and_named(argv, name, capsys):
    assert cli.main(argv) == 2
    assert f"error: {name} must be a path of names of at most 255" in capsys.readouterr().err
