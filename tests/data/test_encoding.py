from __future__ import annotations

import pytest

from loraloom.data.encoding import DROPPED, encode_completions, encode_documents, fit
from loraloom.data.examples import NO_LOSS
from loraloom.errors import DataError

_ = NO_LOSS


def learnt(tokenizer, piece):
    """The text that has a loss."""
    return tokenizer.decode([token for token in piece.labels if token != NO_LOSS])


def test_loss_is_on_the_completion_and_a_closing_eos(tiny_tokenizer):
    (row,) = encode_completions(tiny_tokenizer, [("Question: sky? Answer:", " blue")], 64)
    (piece,) = row.pieces
    assert tiny_tokenizer.decode(piece.input_ids) == "Question: sky? Answer: blue<eos>"
    assert learnt(tiny_tokenizer, piece) == " blue<eos>"
    assert not row.is_cut
    for token, label in zip(piece.input_ids, piece.labels, strict=True):
        assert label in (token, NO_LOSS)


def test_a_long_prompt_loses_its_beginning_and_the_answer_stays(tiny_tokenizer):
    prompt = "one two one two one two Answer:"
    (row,) = encode_completions(tiny_tokenizer, [(prompt, " blue")], 10)
    (piece,) = row.pieces
    assert row.is_cut
    assert len(piece.input_ids) == 10
    assert tiny_tokenizer.decode(piece.input_ids).endswith("Answer: blue<eos>")
    assert learnt(tiny_tokenizer, piece) == " blue<eos>"


def test_an_answer_that_does_not_fit_is_dropped(tiny_tokenizer):
    answer = " yes" * 20
    assert encode_completions(tiny_tokenizer, [("Answer:", answer)], 10) == [DROPPED]


def test_without_an_eos_token_nothing_is_encoded(tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    with pytest.raises(DataError, match="the tokenizer must have an EOS token"):
        encode_completions(tiny_tokenizer, [("a", "b")], 10)


def test_documents_have_loss_on_every_token(tiny_tokenizer):
    (row,) = encode_documents(tiny_tokenizer, ["The sky is blue"], 64)
    (piece,) = row.pieces
    assert tiny_tokenizer.decode(piece.input_ids) == "The sky is blue<eos>"
    assert piece.labels == piece.input_ids


def test_a_long_document_is_divided_and_each_token_predicted_once(tiny_tokenizer):
    text = "What color is the sky? " * 5
    whole = [*tiny_tokenizer(text).input_ids, tiny_tokenizer.eos_token_id]
    (row,) = encode_documents(tiny_tokenizer, [text], 7)
    assert row.is_cut
    assert all(len(piece.input_ids) <= 7 for piece in row.pieces)
    predicted = [token for piece in row.pieces for token in piece.labels[1:]]
    assert predicted == whole[1:]


@pytest.mark.parametrize(
    ("spans", "max_length", "kept", "labels"),
    [
        ("..AA..AA", 8, [1, 2, 3, 4, 5, 6, 7, 8], [_, _, 3, 4, _, _, 7, 8]),
        ("..AA..", 8, [1, 2, 3, 4], [_, _, 3, 4]),
        ("..AA..AA", 5, [4, 5, 6, 7, 8], [_, _, _, 7, 8]),
        ("..AA..AA", 3, [6, 7, 8], [_, 7, 8]),
    ],
)
def test_conversations_keep_their_last_answers(spans, max_length, kept, labels):
    is_learnt = [mark == "A" for mark in spans]
    row = fit(range(1, len(spans) + 1), is_learnt, [], max_length)
    assert list(row.pieces[0].input_ids) == kept
    assert list(row.pieces[0].labels) == labels
    assert row.is_cut == (max_length < 8)


def test_the_last_answer_needs_a_token_before_it():
    is_learnt = [mark == "A" for mark in "..AA..AA"]
    assert fit(range(1, 9), is_learnt, [], 2) == DROPPED
    assert fit(range(1, 9), [False] * 8, [], 8) == DROPPED


def test_bos_stays_in_front_of_a_cut_row():
    is_learnt = [mark == "A" for mark in "b...AA"]
    assert fit([0, 1, 2, 3, 4, 5], is_learnt, [0], 4).pieces[0].input_ids == (0, 3, 4, 5)
    assert fit([0, 1, 2, 3, 4, 5], is_learnt, [0], 3).pieces[0].labels == (_, 4, 5)
    assert fit([0, 1, 2, 3, 4, 5], is_learnt, [0], 2) == DROPPED
