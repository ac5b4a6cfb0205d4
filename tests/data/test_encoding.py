"""Preferences between texts and between messages."""

import pytest

from loraloom.config.data import SourceConfig
from loraloom.data.encoding import SourceEncoder
from loraloom.data.sources import Row
from loraloom.data.tokens import DROPPED, NO_LOSS
from loraloom.errors import DataError
from tests.data.encoded import encode as encode_rows
from tests.data.test_chat import MARKED, PLAIN
from tests.generation.saved import write_rows


def said(role, content):
    return {"role": role, "content": content}


def chat(n: int) -> list[dict]:
    return [said("user", f"{n}?"), said("assistant", "blue " * n)]


def encode(tokenizer, *rows, max_length=64, **columns):
    rows = [Row(row, f"pairs.jsonl, line {line}") for line, row in enumerate(rows, start=1)]
    return encode_rows(tokenizer, rows, max_length, format="preference", fields=columns or None)


def shown(tokenizer, encoded):
    """The whole text and the learnt text of the chosen and of the rejected answer."""
    learnt = ([label for label in piece.labels if label != NO_LOSS] for piece in encoded.pieces)
    return [
        (tokenizer.decode(piece.input_ids).replace("\n", ""), tokenizer.decode(ids).strip("\n"))
        for piece, ids in zip(encoded.pieces, learnt, strict=True)
    ]


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])
def test_messages_follow_those_of_the_prompt_or_their_common_beginning(tiny_tokenizer, template):
    tiny_tokenizer.chat_template = template
    prompt = [said("user", "one?"), said("assistant", "yes"), said("user", "sky?")]
    both = {"chosen": [said("assistant", "blue")], "rejected": [said("assistant", "no")]}
    (encoded,) = encode(tiny_tokenizer, {"prompt": prompt, **both})
    before = "[user]one?<eos>[assistant]yes<eos>[user]sky?<eos>[assistant]"
    expected = [(f"{before}{text}", text) for text in ("blue<eos>", "no<eos>")]
    assert shown(tiny_tokenizer, encoded) == expected
    whole = {role: [*prompt, *messages] for role, messages in both.items()}
    for more in ({}, {"prompt": "sky?"}):
        assert encode(tiny_tokenizer, {**whole, **more}) == [encoded]
    whole["rejected"] += [said("user", "?"), said("assistant", "two")]
    (_, rejected) = shown(tiny_tokenizer, *encode(tiny_tokenizer, whole))
    assert rejected[1].replace("\n", "") == "no<eos>two<eos>"


def test_both_answers_keep_the_same_part_of_a_prompt_that_is_too_long(tiny_tokenizer):
    row = {"question": "abcdefghijklmnopqrstuvwxyz", "good": "!", "rejected": "!!!!!"}
    columns = {"prompt": "question", "chosen": "good", "max_length": 12}
    (encoded,) = encode(tiny_tokenizer, row, **columns)
    assert (encoded.is_cut, encoded.is_pair) == (True, True)
    expected = [(f"uvwxyz{text}", text) for text in ("!<eos>", "!!!!!<eos>")]
    assert shown(tiny_tokenizer, encoded) == expected
    assert encode(tiny_tokenizer, row | {"rejected": "!" * 20}, **columns) == [DROPPED]


def load(tokenizer, dataset: str, data_format: str = "text", max_length: int = 40, **settings):
    config = SourceConfig.model_validate({"dataset": dataset, "format": data_format, **settings})
    return SourceEncoder(config, tokenizer, max_length).load("train")


def test_bad_rows_are_reported_together(tiny_tokenizer, tmp_path):
    texts = [{"prompt": "a" * n, "chosen": " yes", "rejected": f" {n}"} for n in range(20)]
    messages = {"chosen": chat(1), "rejected": chat(2)}  # rows of another kind than the first
    file = write_rows(tmp_path / "rows.jsonl", *texts, *[messages] * 10)
    with pytest.raises(
        DataError, match=r"10 of 30 rows .*\n  10 rows, lines 21, .*, 30: the row has "
    ):
        load(tiny_tokenizer, file, "preference")
    with pytest.raises(DataError, match="line 1: preferences between strings do not"):
        load(tiny_tokenizer, file, "preference", chat_template=PLAIN)


def test_a_template_writes_the_prompts_of_preferences_between_strings(tiny_tokenizer, tmp_path):
    rows = [
        {"prompt": "Why?", "chosen": "yes", "rejected": "no", "topic": "sky"},
        {"prompt": "How?", "chosen": "no", "rejected": "yes", "topic": "sea", "input": "Here."},
    ]
    file = write_rows(tmp_path / "rows.jsonl", *rows)
    template = "{{ topic }}: {{ instruction }}{{ input }}\n"
    written = [{**row, "prompt": prompt} for row, prompt in zip(rows, WRITTEN, strict=True)]
    expected = load(tiny_tokenizer, write_rows(tmp_path / "written.jsonl", *written), "preference")
    assert load(tiny_tokenizer, file, "preference", template=template) == expected
    missing = "{{ nothing }}"
    with pytest.raises(
        DataError, match="lines 1, 2: the prompt template can't be filled in: 'nothing'"
    ):
        load(tiny_tokenizer, file, "preference", template=missing)
    messages = write_rows(tmp_path / "chat.jsonl", {"chosen": chat(1), "rejected": chat(2)})
    with pytest.raises(
        DataError, match="between messages do not support template; remove template"
    ):
        load(tiny_tokenizer, messages, "preference", template="plain")


WRITTEN = ("sky: Why?\n", "sea: How?Here.\n")
"""The prompts of that test, filled in."""
