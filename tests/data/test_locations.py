from __future__ import annotations

import datasets
import pytest

from loraloom.data.files import read_file
from loraloom.data.locations import HubSource, find_named, read_hub, read_rows
from loraloom.errors import DataError


@pytest.fixture
def collection(tmp_path):
    """A directory of two data sets."""
    for name in ("quiz", "riddles"):
        (tmp_path / name).mkdir()
        for split in ("train", "test"):
            (tmp_path / name / f"{split}.jsonl").write_text(f'{{"text": "{name} {split}"}}\n')
    return tmp_path


def texts(rows):
    return [row["text"] for row in rows]


def test_a_data_set_is_found_in_a_directory_of_data_sets(collection):
    assert texts(read_file(find_named(collection, "quiz", "test"))) == ["quiz test"]


def test_a_data_set_is_found_in_its_own_directory(collection):
    assert texts(read_file(find_named(collection / "riddles", "quiz", "train"))) == [
        "riddles train"
    ]


def test_a_single_file_is_read_whatever_its_name(collection):
    (collection / "mine.jsonl").write_text('{"text": "mine"}')
    assert texts(read_file(find_named(collection / "mine.jsonl", "quiz", "test"))) == ["mine"]


def test_a_file_named_after_another_split_is_refused(collection):
    with pytest.raises(DataError, match="split must be train as the file's name says, got 'test'"):
        find_named(collection / "quiz" / "train.jsonl", "quiz", "test")
    with pytest.raises(DataError, match="split must be train as the file's name says, got 'dev'"):
        find_named(collection / "quiz" / "train.jsonl", "quiz", "dev")


def test_an_absent_data_set_offers_the_nearest_name(collection):
    with pytest.raises(DataError, match=r"no data set 'quizz' there; did you mean 'quiz'\?"):
        find_named(collection, "quizz", "test")


def test_an_absent_split_lists_those_there_are(collection):
    with pytest.raises(
        DataError, match=r"no split 'validation' there; the splits are: test, train"
    ):
        find_named(collection, "quiz", "validation")


def test_a_dataset_may_be_a_directory_or_a_file(collection):
    assert texts(read_rows(str(collection / "quiz"), "train")) == ["quiz train"]
    assert texts(read_rows(str(collection / "quiz" / "test.jsonl"), "train")) == ["quiz test"]


def test_a_missing_file_is_not_looked_for_on_the_hub(collection):
    with pytest.raises(DataError, match="no such file or directory"):
        read_rows(str(collection / "nothing"), "train")
    with pytest.raises(DataError, match="no such file or directory"):
        read_rows("alpaca.jsonl", "train")


def test_a_hub_data_set_is_read_at_its_revision(monkeypatch):
    asked = []

    def load_dataset(repository, config, *, revision, split):
        asked.append((repository, config, revision, split))
        return [{"text": "from the hub"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_hub(HubSource("owner/quiz", "easy", "abc"), "train")
    assert asked == [("owner/quiz", "easy", "abc", "train")]
    assert texts(rows) == ["from the hub"]
    assert rows[0].origin == "owner/quiz, train, row 1"
    assert texts(read_rows("owner/quiz", "test", "easy")) == ["from the hub"]
    assert asked[1] == ("owner/quiz", "easy", None, "test")


def test_a_failing_hub_is_a_data_error(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach the Hub\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        DataError, match=r"owner/quiz: .*Couldn't reach the Hub; give the path of a"
    ):
        read_rows("owner/quiz", "train")
