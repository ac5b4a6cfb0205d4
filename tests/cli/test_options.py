from typing import get_type_hints

import pytest

from loraloom.cli import main as cli
from loraloom.cli.options import (
    AdapterOption,
    AttnOption,
    BaseModelOption,
    DeviceOption,
    DtypeOption,
    parse_adapter,
    parse_adapters,
)
from loraloom.errors import ConfigError

SEEN = {}


def load(
    base_model: BaseModelOption,
    adapter: AdapterOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    attn_implementation: AttnOption = None,
) -> None:
    """A verb with every shared option."""
    SEEN.update(
        base_model=base_model,
        adapters=parse_adapters(adapter),
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
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
    }


def test_options_are_read(verb):
    words = "--base-model m --adapter a=x --adapter b=y/z=1 --dtype bfloat16 --device cuda:0"
    assert verb(*words.split(), "--attn-implementation", "eager") == 0
    assert SEEN["adapters"] == {"a": "x", "b": "y/z=1"}
    assert (SEEN["dtype"], SEEN["device"]) == ("bfloat16", "cuda:0")
    assert SEEN["attn_implementation"] == "eager"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dtype float64", "float32"),
        ("--device gpu", "error: device must be auto, cpu, cuda"),
        ("--attn-implementation flash", "sdpa"),
        ("--adapter a", "error: --adapter must be name=path, got 'a'"),
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
