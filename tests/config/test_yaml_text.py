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


UNKNOWN = ["!!python/object/apply:os.getcwd []", "a: \0", "a: 2024-13-45", "!!bool maybe"]


@pytest.mark.parametrize("text", [*UNKNOWN, "!!timestamp foo", "!!int ''"])
def test_what_safe_yaml_does_not_know_is_refused(text):
    with pytest.raises(ConfigError, match=r"run\.yaml must be valid YAML"):
        parse_yaml(text, "run.yaml")


def test_what_is_nested_too_deeply_is_refused():
    with pytest.raises(ConfigError, match="here must be YAML of a few levels"):
        parse_yaml("[" * 5000, "here")


@pytest.mark.parametrize("merge", ["[{}, {}]", "{{a: {}, b: {}}}", "{{<<: [{}, {}], x: 1}}"])
def test_aliases_that_expand_to_ever_more_are_refused_at_once(merge):
    lines = ["- &n0 {x: 1}"] if "<<" in merge else ["- &n0 [1]"]
    for place in range(60):
        lines.append(f"- &n{place + 1} " + merge.format(f"*n{place}", f"*n{place}"))
    with pytest.raises(ConfigError, match=r"here must be valid YAML, line \d+.*more than 100,000"):
        parse_yaml("\n".join(lines), "here")


def test_an_alias_of_itself_is_refused():
    with pytest.raises(ConfigError, match="an alias stands inside of what it stands for"):
        parse_yaml("a: &a [1, *a]", "here")


def test_aliases_share_settings():
    assert parse_yaml("a: &a [1, 2]\nb: *a", "here") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("digits", ["9" * 5000, "0x" + "f" * 5000, "1:" * 5000 + "1"])
def test_a_number_of_many_digits_is_refused_with_its_line(digits):
    with pytest.raises(ConfigError, match="line 2, column 4: a whole number has more than 100"):
        parse_yaml(f"a: 1\nb: {digits}", "here")


@pytest.mark.parametrize("text", ['a: "x\\ud800"', '"\\udfff": 1'])
def test_half_of_a_surrogate_pair_is_refused_with_its_line(text):
    with pytest.raises(ConfigError, match=r"line 1, column .*surrogate"):
        parse_yaml(text, "here")
