import pytest

from loraloom.config.overrides import apply_override
from loraloom.errors import ConfigError


def settings():
    return {"dtype": "float32", "jobs": [{"train": {"rate": 1}}, {"train": None}]}


def test_a_path_of_keys_and_indices_is_followed():
    changed = apply_override(settings(), "jobs.0.train.rate=1e-4")
    assert changed["jobs"][0] == {"train": {"rate": 1e-4}}
    assert changed["jobs"][1] == {"train": None}


def test_missing_mappings_are_made():
    changed = apply_override(settings(), "jobs.1.train.early_stopping.patience=2")
    assert changed["jobs"][1]["train"] == {"early_stopping": {"patience": 2}}


@pytest.mark.parametrize(
    ("text", "value"),
    [("null", None), ("", None), ("a=b", "a=b"), ("[x, 1]", ["x", 1]), ("{a: 1}", {"a": 1})],
)
def test_a_value_is_yaml(text, value):
    assert apply_override(settings(), f"dtype={text}")["dtype"] == value


def test_the_settings_given_stay_as_they_are():
    given = settings()
    apply_override(given, "jobs.0.train.rate=2")
    assert given == settings()


def test_jobs_that_share_a_mapping_are_changed_one_by_one():
    shared = {"rate": 1}
    changed = apply_override(
        {"jobs": [{"train": shared}, {"train": shared}]}, "jobs.0.train.rate=2"
    )
    assert [job["train"]["rate"] for job in changed["jobs"]] == [2, 1]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("jobs.0.train.rate", "--set must be path=value"),
        ("=3", "--set must be path=value"),
        ("jobs.2.name=a", r"after jobs must come an index in \[0, 1\], got '2'"),
        ("jobs.-1.name=a", r"after jobs must come an index in \[0, 1\], got '-1'"),
        ("jobs.first.name=a", r"after jobs must come an index in \[0, 1\], got 'first'"),
        ("dtype.x=1", "dtype must be a mapping or a list to be changed inside, got 'float32'"),
        ("dtype=[1", "the value of --set dtype must be valid YAML"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        apply_override(settings(), override)
