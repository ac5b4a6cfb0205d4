from __future__ import annotations

import pytest

from loraloom.data.sources import Row
from loraloom.data.tokens import DROPPED, NO_LOSS
from loraloom.errors import DataError
from tests.data.encoded import encode as encode_rows
from tests.data.test_chat import MARKED, PLAIN

TEMPLATES = pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["plain", "marked"])


def encode(tokenizer, *rows, max_length=64, **columns):
    rows = [Row(row, f"pairs.jsonl, line {line}") for line, row in enumerate(rows, start=1)]
    return encode_rows(tokenizer, rows, max_length, format="preference", fields=columns or None)


def shown(tokenizer, encoded):
    """The whole text and the learnt text of the chosen and of the rejected answer."""
    return [
        (
            tokenizer.decode(piece.input_ids),
            tokenizer.decode([label for label in piece.labels if label != NO_LOSS]),
        )
        for piece in encoded.pieces
    ]


def said(role, content):
    return {"role": role, "content": content}


def test_texts_follow_their_prompt_and_end_with_eos(tiny_tokenizer):
    row = {"prompt": "color? ", "chosen": "blue", "rejected": "one two"}
    (encoded,) = encode(tiny_tokenizer, row)
    assert encoded.is_pair
    assert shown(tiny_tokenizer, encoded) == [
        ("color? blue<eos>", " blue<eos>"),
        ("color? one two<eos>", " one two<eos>"),
    ]


def test_columns_may_have_other_names(tiny_tokenizer):
    row = {"question": "sky?", "good": " blue", "rejected": " no"}
    (encoded,) = encode(tiny_tokenizer, row, prompt="question", chosen="good")
    assert shown(tiny_tokenizer, encoded)[0] == ("sky? blue<eos>", " blue<eos>")


@TEMPLATES
def test_messages_follow_those_of_the_prompt(tiny_tokenizer, template):
    tiny_tokenizer.chat_template = template
    prompt = [said("user", "one?"), said("assistant", "yes"), said("user", "sky?")]
    row = {
        "prompt": prompt,
        "chosen": [said("assistant", "blue")],
        "rejected": [said("assistant", "no")],
    }
    (encoded,) = encode(tiny_tokenizer, row)
    before = "[user]one?<eos>[assistant]yes<eos>[user]sky?<eos>[assistant]"
    assert [
        (whole.replace("\n", ""), learnt.strip())
        for whole, learnt in shown(tiny_tokenizer, encoded)
    ] == [(f"{before}blue<eos>", "blue<eos>"), (f"{before}no<eos>", "no<eos>")]


@TEMPLATES
@pytest.mark.parametrize("prompt", [{}, {"prompt": "sky?"}], ids=["none", "text"])
def test_whole_conversations_are_learnt_from_where_they_part(tiny_tokenizer, template, prompt):
    tiny_tokenizer.chat_template = template
    shared = [said("user", "one?"), said("assistant", "yes"), said("user", "sky?")]
    row = {
        **prompt,
        "chosen": [*shared, said("assistant", "blue")],
        "rejected": [*shared, said("assistant", "no"), said("user", "?"), said("assistant", "two")],
    }
    (encoded,) = encode(tiny_tokenizer, row)
    learnt = [text.replace("\n", "") for _, text in shown(tiny_tokenizer, encoded)]
    assert learnt == ["blue<eos>", "no<eos>two<eos>"]


def test_both_answers_keep_the_same_part_of_a_prompt_that_is_too_long(tiny_tokenizer):
    row = {"prompt": "abcdefghijklmnopqrstuvwxyz", "chosen": "!", "rejected": "!!!!!"}
    (encoded,) = encode(tiny_tokenizer, row, max_length=12)
    assert encoded.is_cut
    chosen, rejected = shown(tiny_tokenizer, encoded)
    assert chosen[0] == "uvwxyz!<eos>"
    assert rejected[0] == "uvwxyz!!!!!<eos>"


def test_a_pair_of_which_one_answer_does_not_fit_is_dropped(tiny_tokenizer):
    row = {"prompt": "sky?", "chosen": "!", "rejected": "!" * 20}
    assert encode(tiny_tokenizer, row, max_length=12) == [DROPPED]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "line 2: the row has no field 'rejected'"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "line 2: field 'chosen' must be a str"),
        ({"chosen": "b", "rejected": "c"}, "line 2: the row has no field 'prompt'"),
    ],
)
def test_a_row_that_is_no_preference_names_file_and_line(tiny_tokenizer, row, message):
    first = {"prompt": "a", "chosen": "b", "rejected": "c"}
    with pytest.raises(DataError, match=rf"pairs\.jsonl, {message}"):
        encode(tiny_tokenizer, first, row)


def test_messages_need_a_chat_template(tiny_tokenizer):
    row = {"chosen": [said("user", "a")], "rejected": [said("user", "b")]}
    with pytest.raises(DataError, match="must have a chat template for messages"):
        encode(tiny_tokenizer, row)
