import errno
import itertools
import os
import shutil
import threading
from pathlib import Path

import pytest

from loraloom.atomic_io import (
    append_line,
    cut_torn_line,
    prepare_output,
    remove,
    remove_leftovers,
    staging,
    write_directory,
    write_file,
    write_json,
    write_output,
    write_text,
)
from loraloom.errors import ConfigError


def fill_with(text: str):
    return lambda directory: (directory / "a.txt").write_text(text)


def test_what_is_written_replaces_what_was_there(tmp_path):
    write_directory(tmp_path / "a", lambda directory: (directory / "old.txt").write_text(""))
    write_directory(tmp_path / "a", fill_with("new"))
    assert os.listdir(tmp_path / "a") == ["a.txt"]
    path = tmp_path / "a.txt"
    write_output(path, "old")
    write_output(path, "neu, größer\n")
    assert path.read_text(encoding="utf-8") == "neu, größer\n"
    write_json(path, "caf\udce9")  # a name that is not UTF-8, as Python has it
    assert path.read_text(encoding="utf-8") == '"caf?"\n'
    assert sorted(os.listdir(tmp_path)) == ["a", "a.txt"]


def test_a_file_that_cannot_be_replaced_stays_and_nothing_is_left_over(tmp_path, monkeypatch):
    path, number = tmp_path / "a.txt", errno.EINVAL

    def fail(*_):
        raise OSError(number, "disk full")

    monkeypatch.setattr(os, "fsync", fail)  # as some network file systems do
    write_output(path, "old")
    number = errno.ENOSPC
    with pytest.raises(ConfigError, match=r"a\.txt can't be written: .*disk full"):
        write_output(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
@pytest.mark.parametrize("write", [write_file, write_directory])
def test_whatever_ends_the_writing_leaves_nothing_aside(tmp_path, write, error):
    def fail(aside):
        if aside.is_dir():
            fill_with("half")(aside)
        else:
            aside.write_text("half")
        raise error

    with pytest.raises(error):
        write(tmp_path / "new", fail)
    assert os.listdir(tmp_path) == []


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a.txt").symlink_to("mine.txt")
    (tmp_path / "directory").symlink_to("elsewhere")
    write_text(tmp_path / "a.txt", "new")
    write_directory(tmp_path / "directory", fill_with("new"))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert os.listdir(tmp_path / "elsewhere") == []
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "directory/a.txt").read_text() == "new"


def test_a_link_where_a_file_goes_aside_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / ".guessed.writing").symlink_to("mine.txt")
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_files_have_the_users_rights_and_names_as_long_as_names_may_be(tmp_path):
    (tmp_path / "expected").write_text("")
    path = tmp_path / ("x" * 255)
    write_text(path, "new")
    assert path.stat().st_mode == (tmp_path / "expected").stat().st_mode


@pytest.mark.parametrize("write", [write_text, write_directory])
def test_several_writers_of_one_name_leave_what_one_of_them_wrote(tmp_path, write):
    errors: list[Exception] = []

    def write_often(text: str) -> None:
        content = text if write is write_text else fill_with(text)
        try:
            for _ in range(20):
                write(tmp_path / "shared", content)
        except OSError as error:
            errors.append(error)

    texts = [letter * 1000 for letter in "abc"]
    threads = [threading.Thread(target=write_often, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    file = tmp_path / "shared" if write is write_text else tmp_path / "shared/a.txt"
    assert file.read_text() in texts
    assert os.listdir(tmp_path) == ["shared"]


@pytest.mark.parametrize("interrupted", range(3))
def test_a_replacement_that_is_interrupted_leaves_the_old_directory_or_the_new(
    tmp_path, monkeypatch, interrupted
):
    write_directory(tmp_path / "a", fill_with("old"))
    calls = itertools.count()

    def interruptible(operation):
        def interrupt_or_run(*arguments, **options):
            if next(calls) == interrupted:
                raise KeyboardInterrupt
            return operation(*arguments, **options)

        return interrupt_or_run

    monkeypatch.setattr(os, "replace", interruptible(os.replace))
    monkeypatch.setattr("shutil.rmtree", interruptible(shutil.rmtree))
    with pytest.raises(KeyboardInterrupt):
        write_directory(tmp_path / "a", fill_with("new"))
    assert (tmp_path / "a/a.txt").read_text() == ("new" if interrupted == 2 else "old")


def test_what_killed_writers_left_is_deleted_and_nothing_else(tmp_path):
    (tmp_path / ".0123456789abcdef.writing").mkdir()
    (tmp_path / ".123456789abcdef0.writing").write_text("half")
    (tmp_path / ".my.writing").write_text("whole")
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == [".my.writing"]
    (tmp_path / ".23456789abcdef01.writing").write_text("half")
    remove_leftovers(tmp_path, older_than_s=60.0)
    assert len(os.listdir(tmp_path)) == 2, "somebody may be writing it"


def test_removing_a_link_leaves_its_target_and_a_staging_directory_is_gone_afterwards(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.txt").write_text("")
    (tmp_path / "link").symlink_to("mine")
    remove(tmp_path / "link")
    remove(tmp_path / "not there")
    assert os.listdir(tmp_path) == ["mine"]
    remove(tmp_path / "mine")
    with staging(tmp_path) as directory:
        fill_with("")(directory)
    assert os.listdir(tmp_path) == []


def test_the_directory_of_an_output_is_made_and_what_can_be_no_file_is_an_error(tmp_path):
    prepare_output(tmp_path / "a" / "b" / "c.json", "--output")
    assert (tmp_path / "a" / "b").is_dir()
    prepare_output(None, "--output")
    with pytest.raises(ConfigError, match="--output must be a file, got the directory"):
        prepare_output(tmp_path, "--output")
    with pytest.raises(ConfigError, match="--output must be a file, got the device or pipe"):
        prepare_output(Path(os.devnull), "--output")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--output can't be written to"):
        prepare_output(tmp_path / "file" / "x.json", "--output")


def test_a_line_is_appended_to_whole_lines(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "one")
    append_line(path, "zwö")
    assert path.read_text() == "one\nzwö\n"
    path.write_text("one\nto")
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


@pytest.mark.parametrize(
    ("text", "max_bytes", "left"),
    [
        ("one\ntwo\n", None, "one\ntwo\n"),
        ("one\ntw", None, "one\n"),
        ("on", None, ""),
        ("one\ntwo\nthree\n", 8, "one\ntwo\n"),
        ("one\ntwo\nthree\n", 7, "one\n"),
        ("one\ntwo\n", 0, ""),
    ],
)
def test_lines_are_cut_after_the_last_whole_one(tmp_path, text, max_bytes, left):
    path = tmp_path / "lines"
    path.write_text(text)
    cut_torn_line(path, max_bytes)
    assert path.read_text() == left
