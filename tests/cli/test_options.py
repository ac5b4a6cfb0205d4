from pathlib import Path
from typing import Annotated

import pytest
from cyclopts import Parameter

from loraloom.cli import main as cli
from loraloom.cli.options import HostOptions

SEEN = {}


def load(
    paths: list[Path] | None = None, /, *, model: Annotated[HostOptions, Parameter(name="*")]
) -> None:
    """A verb with every shared option."""
    SEEN.update(model.model_dump() | {"adapters": model.adapters, "paths": paths})
    SEEN["quantization"] = model.quantization


@pytest.fixture
def verb(monkeypatch):
    monkeypatch.setitem(cli.VERBS, "load", (load, "Load."))
    SEEN.clear()
    return lambda *argv: cli.main(["load", *argv])


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
    ("words", "message"),
    [
        ("--dtype flaot32", "did you mean 'float32'?"),
        ("--device gpu", "error: device must be auto, cpu, cuda"),
        ("--attn-implementation flash", "sdpa"),
        ("--adapter a", "error: --adapter must be NAME=PATH, where NAME"),
        ("--quantization nf5", "did you mean 'nf4'?"),
        ("--devcie cpu", "Did you mean --device?"),
        ("--adapter law=", "got 'law='"),
        ("--adapter a/b=x", "error: name must be a safe file name"),
        ("--adapter base=x", "NAME is new and not 'base'"),
        ("--adapter a=x --adapter a=y", "got 'a=y'"),
    ],
)
def test_a_wrong_option_is_code_2(verb, capsys, words, message):
    assert verb("--base-model", "m", *words.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["report", "."], ["train", "run.yaml", "--watch"], ["eval", "--output"]]
)
def test_a_path_that_can_not_exist_is_code_2(argv, capsys):
    assert cli.main([*argv, 300 * "x"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "words", ["report ~/runs --output=x.html", "eval --base-model b --task skills --output=~/runs"]
)
def test_a_path_may_begin_with_the_home_directory(monkeypatch, tmp_path, capsys, words):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(words.split()) == 2
    assert f"got {tmp_path / 'runs'}" in capsys.readouterr().err
