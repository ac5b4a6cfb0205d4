from __future__ import annotations

from pathlib import Path

import pytest

from loraloom.config.paths import local_path
from loraloom.errors import ConfigError, FormatError


@pytest.mark.parametrize("text", ["a/b", ".", "/", "~", "ä/模型", "x" * 255, "a b", "\udcff"])
def test_a_path_that_could_exist_is_taken(text):
    assert local_path(text, "--output") == Path(text).expanduser()


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a\0b", r"got 'a\\x00b' with a null character"),
        ("x" * 300, "names of at most 255 bytes, together 4095, got 300 and 300 in 'xxx"),
        ("ä" * 200, "got 400 and 400 in"),
        ("a/" * 3000, "got 1 and 5999 in"),
        ("~nosuchuser/a", "got '~nosuchuser/a': no such user here"),
        ("\ud800", r"got '\\ud800', which no file has"),
    ],
)
def test_a_path_that_can_not_exist_is_one_clear_error(text, fault):
    with pytest.raises(ConfigError, match=f"--output must be a path.*{fault}"):
        local_path(text, "--output")


def test_a_directory_that_may_not_be_looked_into_is_one_clear_error(monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ConfigError, match="no permission to look into its directory"):
        local_path("/root/x.jsonl", "dataset")


def test_the_error_is_the_callers():
    with pytest.raises(FormatError, match="an adapter must be a path"):
        local_path("\0", "an adapter", FormatError)
