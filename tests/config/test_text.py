from pathlib import Path

import pytest

from loraloom.config.text import (
    apply_override,
    local_path,
    parse_json,
    parse_yaml,
    read_json,
    to_yaml,
)
from loraloom.errors import ConfigError, DataError, FormatError


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("1e-4", 1e-4), ("2E5", 2e5), ("-1.5e+3", -1500.0), ("3", 3), ("true", True)],
        *[("e4", "e4"), ("'1e-4'", "1e-4"), ("", None), ("yes", "yes")],
        ("{a: &a {x: 1, y: 2}, b: {<<: *a, x: 3}}", {"a": {"x": 1, "y": 2}, "b": {"x": 3, "y": 2}}),
    ],
)
def test_yaml_is_that_of_version_1_2(text, value):
    parsed = parse_yaml(text, "text")
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a:\n  rank: 1\n  rank: 2\n", ", line 3, column 3: .*duplicate key"),
        ("a: [1, 2\nb: 3\n", ", line 2, column 2"),
        ("!!python/object/apply:os.getcwd []", ", line 1"),
        *[
            (text, "")
            for text in ("a: \0", "a: 2024-13-45", "!!bool maybe", "!!int ''", "9" * 5000)
        ],
        ("[" * 1500, ""),
    ],
)
def test_what_is_no_yaml_is_one_clear_error(text, fault):
    with pytest.raises(ConfigError, match=rf"run\.yaml must be .*YAML.*{fault}"):
        parse_yaml(text, "run.yaml")


def test_what_is_written_is_read_alike():
    texts = ["on", "yes", "08", "1e-3", "1_000", "1:30", "010", "~", "2024-01-01", "a: b", "ä\n  b"]
    settings = {"texts": texts, "numbers": [1e-5, 2.5e20, 1e22, 0.1, 3], "flags": [True, None]}
    assert parse_yaml(to_yaml(settings), "text") == settings


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "EOF while parsing a value at line 1 column 0"),
        ('{"a": 1,\n oops}', "key must be a string at line 2 column 2"),
        ("[" * 100_000, "recursion limit exceeded at line 1 column 202"),
        ("[NaN]", "expected value at line 1 column 2"),
        ("1" * 5000, "number out of range"),
        ('"\ud800"', "Expected"),
    ],
)
def test_what_is_no_json_is_an_error_with_its_line(text, fault):
    with pytest.raises(FormatError, match=rf"f\.json must be JSON: {fault}"):
        parse_json(text, "f.json", FormatError)


def test_a_file_that_can_not_be_read_is_one_clear_error(tmp_path):
    file = tmp_path / "f.json"
    with pytest.raises(DataError, match=r"can't be read: No such file"):
        read_json(file, DataError)
    file.write_text("[1]", encoding="utf-8-sig")
    assert read_json(file) == [1]
    file.write_bytes(b'"\xff"')
    with pytest.raises(DataError, match=r"must be text in UTF-8: .*position 1"):
        read_json(file, DataError)


@pytest.mark.parametrize("text", ["a/b", "/", "~", "ä/模型", "x" * 255, "a b"])
def test_a_path_that_could_exist_is_taken(text):
    assert local_path(text, "--output") == Path(text).expanduser()


@pytest.mark.parametrize("text", ["a\0b", "x" * 300, "a/" * 3000, "~nosuchuser/a", "\ud800"])
def test_a_path_that_can_not_exist_is_one_clear_error(text):
    with pytest.raises(FormatError, match="an adapter must be a path, got '"):
        local_path(text, "an adapter", FormatError)


def settings():
    return {"dtype": "float32", "jobs": [{"train": {"rate": 1}}, {"train": None}]}


@pytest.mark.parametrize(
    ("override", "job"),
    [
        ("jobs.0.train.rate=1e-4", {"train": {"rate": 1e-4}}),
        ("jobs.0.train.a.b=[x, 1]", {"train": {"rate": 1, "a": {"b": ["x", 1]}}}),
        ("jobs.0.train=", {"train": None}),
        ("jobs.0=a=b", "a=b"),
    ],
)
def test_an_override_changes_a_copy(override, job):
    given = settings()
    assert apply_override(given, override)["jobs"] == [job, {"train": None}]
    assert given == settings()


def test_jobs_that_share_a_mapping_are_changed_one_by_one():
    shared = {"rate": 1}
    jobs = {"jobs": [{"train": shared}, {"train": shared}]}
    changed = apply_override(jobs, "jobs.0.train.rate=2")
    assert [job["train"]["rate"] for job in changed["jobs"]] == [2, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("jobs.0.train.rate", "--set must be path=value"),
        ("=3", "--set must be path=value"),
        ("jobs.2.name=a", r"--set jobs.2.name: '2' must be an index in \[0, 1\]"),
        ("jobs.first.name=a", r"'first' must be an index in \[0, 1\]"),
        ("empty.0.name=a", "--set empty.0.name: '0' must be in a list that has items"),
        ("dtype.x=1", "--set dtype.x: 'float32' contains no settings to change"),
        ("dtype=[1", "the value of --set dtype must be valid YAML"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_override(settings() | {"empty": []}, override)
