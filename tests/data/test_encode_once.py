"""Long data is encoded once; what is read again is what encoding gives, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from loraloom.config.data import SourceConfig
from loraloom.data import encoding
from loraloom.data.encoding import SourceEncoder
from loraloom.errors import DataError

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chat(n: int) -> list[dict]:
    return [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "blue " * n}]


DATA = {
    "instruction": [{"instruction": f"Say {n}.", "output": "yes " * (n + 1)} for n in range(25)],
    "text": [{"text": "The sky is blue. " * (n + 1)} for n in range(25)],
    "chat": [{"messages": chat(n + 1)} for n in range(25)],
    "preference": [{"prompt": "a" * n, "chosen": " yes", "rejected": f" {n}"} for n in range(25)],
}
"""Some rows are too long for what the tests take: they are cut, divided or dropped."""


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Where entries go; little counts as long."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(encoding, "MIN_ROWS", 20)
    monkeypatch.setattr(encoding, "_BLOCK", 10)
    return tmp_path / "cache" / "loraloom"


@pytest.fixture
def tokenizer(tiny_tokenizer):
    tiny_tokenizer.chat_template = TEMPLATE
    return tiny_tokenizer


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def load(tokenizer, dataset: str, data_format: str = "text", max_length: int = 40, **settings):
    config = SourceConfig.model_validate({"dataset": dataset, "format": data_format, **settings})
    return SourceEncoder(config, tokenizer, max_length).load("train").rows


def entries(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.arrow"))


def refuse(*_, **__):
    raise AssertionError("encoded again")


@pytest.mark.parametrize("data_format", DATA)
def test_what_is_read_is_what_encoding_gives(tokenizer, tmp_path, cache, monkeypatch, data_format):
    file = write(tmp_path / "rows.jsonl", DATA[data_format])
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "MIN_ROWS", 100)
        expected = load(tokenizer, file, data_format)
    assert not cache.exists()
    assert load(tokenizer, file, data_format) == expected
    monkeypatch.setattr(encoding.SourceEncoder, "encode", refuse)
    assert load(tokenizer, file, data_format) == expected
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("as_pairs", [False, True])
def test_a_task_is_encoded_once_too(tokenizer, cache, monkeypatch, as_pairs):
    config = SourceConfig(task="skills")

    def loaded():
        return SourceEncoder(config, tokenizer, 64, as_pairs).load("train", 30)

    first = loaded()
    monkeypatch.setattr(encoding, "encode_completions", refuse)
    monkeypatch.setattr(encoding, "encode_completion_pairs", refuse)
    assert loaded() == first
    monkeypatch.undo()
    assert loaded() == first


def test_whatever_changes_tokens_makes_another_entry(tokenizer, tmp_path, cache):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ instruction }}:")
    rows = DATA["instruction"]
    file = write(tmp_path / "rows.jsonl", rows)

    def num_entries(**changes) -> int:
        settings = {"template": str(template), "max_length": 40} | changes
        load(tokenizer, file, "instruction", **settings)
        return len(entries(cache))

    assert num_entries() == num_entries() == 1
    assert num_entries(max_length=39) == 2
    assert num_entries(fields={"input": "instruction"}) == 3
    template.write_text("{{ instruction }}>")
    assert num_entries() == 4
    write(tmp_path / "rows.jsonl", [*rows[:-1], rows[-1] | {"output": "no"}])
    assert num_entries() == 5
    tokenizer.add_tokens(["Say"])
    assert num_entries() == 6
    tokenizer.eos_token = "<bos>"
    assert num_entries() == 7


def test_without_a_cache_rows_are_encoded_as_ever(tokenizer, tmp_path, cache):
    cache.parent.write_text("in the way")
    assert len(load(tokenizer, write(tmp_path / "rows.jsonl", DATA["text"]))) == 25


def test_rows_of_another_kind_than_the_first_are_an_error_in_every_block(
    tokenizer, tmp_path, cache
):
    messages = {"chosen": chat(1), "rejected": [*chat(1)[:1], {"role": "assistant", "content": ""}]}
    file = write(tmp_path / "rows.jsonl", [*DATA["preference"][:20], *[messages] * 10])
    message = "10 of 30 rows can't be used:\n  lines 21, 22, .*, 30: the row has no field 'prompt'"
    with pytest.raises(DataError, match=message):
        load(tokenizer, file, "preference")


def test_an_entry_remembers_bad_rows(tokenizer, tmp_path, cache):
    file = write(tmp_path / "rows.jsonl", [*DATA["text"], {"text": ""}])
    for _ in range(2):
        with pytest.raises(DataError, match="line 26: field 'text' is empty"):
            load(tokenizer, file)
    assert len(entries(cache)) == 1
