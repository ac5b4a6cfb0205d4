from __future__ import annotations

import random

import pytest

from loraloom.infer.sampling import before_stop
from loraloom.serve.text import TextStream


def streamed(tokenizer, ids, stop=()):
    """The pieces of a text, up to a stop text."""
    stream = TextStream(tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return pieces


def test_pieces_of_any_tokens_are_the_text_of_all(tiny_tokenizer):
    draw = random.Random(0)
    for _ in range(200):
        ids = [draw.randrange(3, 300) for _ in range(draw.randrange(1, 40))]
        assert "".join(streamed(tiny_tokenizer, ids)) == tiny_tokenizer.decode(ids)


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "🦊🦊 and 🐻‍❄️", "a  b\n\n c"])
def test_characters_of_several_bytes_come_whole(tiny_tokenizer, text):
    pieces = streamed(tiny_tokenizer, tiny_tokenizer(text)["input_ids"])
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_ends_before_the_first_stop_text(tiny_tokenizer):
    draw = random.Random(1)
    for _ in range(200):
        text = "".join(draw.choice("abcab \n") for _ in range(30))
        stop = tuple(
            "".join(draw.choice("abc ") for _ in range(draw.randrange(1, 4))) for _ in "xy"
        )
        pieces = streamed(tiny_tokenizer, tiny_tokenizer(text)["input_ids"], stop)
        assert "".join(pieces) == before_stop(text, stop)


def test_what_may_begin_a_stop_text_is_held_back(tiny_tokenizer):
    stream = TextStream(tiny_tokenizer, ("END",))
    settled = [
        "".join(stream.push(token) for token in tiny_tokenizer(text)["input_ids"])
        for text in ("so E", "N!")
    ]
    assert settled == ["so ", "EN!"]


def test_special_tokens_are_no_text(tiny_tokenizer):
    ids = [*tiny_tokenizer("one")["input_ids"], tiny_tokenizer.bos_token_id]
    assert "".join(streamed(tiny_tokenizer, ids)) == "one"


@pytest.mark.parametrize("stop", ["<bos>", "one<bos>", "bos"])
def test_a_special_token_ends_a_text_in_which_it_is_not_seen(tiny_tokenizer, stop):
    one, two = (tiny_tokenizer(word)["input_ids"] for word in ("one", "two"))
    stream = TextStream(tiny_tokenizer, (stop,))
    pushed = "".join(stream.push(token) for token in [*one, tiny_tokenizer.bos_token_id])
    assert (pushed, stream.stopped, stream.finish()) == ("one", True, "")
    assert "".join(streamed(tiny_tokenizer, [*one, *two], (stop,))) == "onetwo"
