from __future__ import annotations

import os

import pytest

from loraloom.durable import prepare_output, write_output
from loraloom.errors import ConfigError


def test_text_is_written_and_replaced(tmp_path):
    path = tmp_path / "a.txt"
    write_output(path, "old")
    write_output(path, "neu, größer\n")
    assert path.read_text(encoding="utf-8") == "neu, größer\n"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_over(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    write_output(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ConfigError, match=r"a\.txt can't be written: disk full"):
        write_output(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_directory_of_an_output_is_made(tmp_path):
    prepare_output(tmp_path / "a" / "b" / "c.json", "--output")
    assert (tmp_path / "a" / "b").is_dir()
    prepare_output(None, "--output")


def test_an_output_that_is_a_directory_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="--output must be a file, got the directory"):
        prepare_output(tmp_path, "--output")


def test_an_output_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output can't be written to"):
        prepare_output(tmp_path / "file" / "x.json", "--output")
