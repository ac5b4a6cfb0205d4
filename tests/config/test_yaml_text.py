import pytest

from loraloom.config.yaml_text import parse_yaml
from loraloom.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("2E5", 2e5), ("-1.5e+3", -1500.0), (".5e1", 5.0), ("1.0e-4", 1e-4)],
)
def test_exponents_are_numbers_without_a_point_or_a_sign(text, value):
    parsed = parse_yaml(text, "text")
    assert parsed == value
    assert isinstance(parsed, float)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("true", True), ("e4", "e4"), ("1e-4x", "1e-4x"), ("'1e-4'", "1e-4"), ("", None)],
)
def test_other_scalars_are_those_of_yaml(text, value):
    assert parse_yaml(text, "text") == value


def test_a_merged_key_may_be_overridden():
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}"
    assert parse_yaml(text, "text")["b"] == {"x": 3, "y": 2}


def test_a_key_that_stands_twice_is_refused_with_its_line():
    message = r"run\.yaml must be valid YAML, line 3, column 3: the key 'rank' stands twice"
    with pytest.raises(ConfigError, match=message):
        parse_yaml("a:\n  rank: 1\n  rank: 2\n", "run.yaml")


def test_a_syntax_error_is_named_with_its_line():
    with pytest.raises(ConfigError, match=r"run\.yaml must be valid YAML, line 2, column 2"):
        parse_yaml("a: [1, 2\nb: 3\n", "run.yaml")


@pytest.mark.parametrize("text", ["!!python/object/apply:os.getcwd []", "a: \0", "a: 2024-13-45"])
def test_what_safe_yaml_does_not_know_is_refused(text):
    with pytest.raises(ConfigError, match=r"run\.yaml must be valid YAML"):
        parse_yaml(text, "run.yaml")


def test_what_is_nested_too_deeply_is_refused():
    with pytest.raises(ConfigError, match="here must be YAML of a few levels"):
        parse_yaml("[" * 5000, "here")
