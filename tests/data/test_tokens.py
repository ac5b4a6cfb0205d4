import pytest
from tokenizers.processors import TemplateProcessing

from loraloom.data.tokens import (
    DROPPED,
    NO_LOSS,
    Example,
    encode_completions,
    encode_documents,
    encode_pairs,
    encode_texts,
    fit,
    leading_tokens,
)
from loraloom.errors import DataError


def encode_pair(tokenizer, context, continuation):
    return encode_pairs(tokenizer, [(context, continuation)])[0]


def learnt(tokenizer, piece):
    """The text that has a loss."""
    return tokenizer.decode([token for token in piece.labels if token != NO_LOSS])


def marked(spans):
    """Tokens 1, 2, ... of which those marked with A are learnt."""
    ids = tuple(range(1, len(spans) + 1))
    labels = (token if mark == "A" else NO_LOSS for token, mark in zip(ids, spans, strict=True))
    return Example(ids, tuple(labels))


@pytest.fixture
def bos_tokenizer(tiny_tokenizer):
    """The tiny tokenizer, which now puts BOS in front and EOS at the end."""
    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    return tiny_tokenizer


@pytest.mark.parametrize("pair", [("sky?\nAnswer:", " blue"), ("sky?\nAnswer: ", "blue")])
def test_both_parts_are_the_tokens_of_the_text_and_a_space_begins_the_answer(tiny_tokenizer, pair):
    context, continuation = encode_pair(tiny_tokenizer, *pair)
    assert context + continuation == tiny_tokenizer("sky?\nAnswer: blue").input_ids
    assert tiny_tokenizer.decode(continuation) == " blue"


def test_a_token_over_the_cut_belongs_to_the_continuation(tiny_tokenizer):
    assert len(tiny_tokenizer("Answer").input_ids) == 1
    context, continuation = encode_pair(tiny_tokenizer, "yes Answ", "er no")
    assert context + continuation == tiny_tokenizer("yes Answer no").input_ids
    assert tiny_tokenizer.decode(continuation).strip() == "Answer no"


def test_bos_is_added_once_and_eos_never(bos_tokenizer):
    bos, eos = bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id
    assert leading_tokens(bos_tokenizer) == [bos]
    for context in ("Answer:", "<bos>Answer:"):
        ids, continuation = encode_pair(bos_tokenizer, context, " yes")
        assert ids[0] == bos
        assert (ids + continuation).count(bos) == 1
        assert eos not in ids + continuation


def test_an_empty_context_is_the_token_that_begins_a_text(tiny_tokenizer, bos_tokenizer):
    expected = [tiny_tokenizer.bos_token_id], tiny_tokenizer.encode("yes", add_special_tokens=False)
    assert encode_pair(tiny_tokenizer, "", "yes") == expected
    assert encode_pair(bos_tokenizer, "", "yes") == expected


def test_without_bos_and_eos_an_empty_context_is_refused(tiny_tokenizer):
    assert encode_texts(tiny_tokenizer, ["yes", ""]) == [tiny_tokenizer("yes").input_ids, []]
    tiny_tokenizer.bos_token = None
    assert encode_pair(tiny_tokenizer, "", "yes")[0] == [tiny_tokenizer.eos_token_id]
    tiny_tokenizer.eos_token = None
    for encode in (encode_pair, lambda *args: encode_completions(args[0], [args[1:]], 10)):
        with pytest.raises(DataError, match="the tokenizer must have an EOS token"):
            encode(tiny_tokenizer, "", "yes")


def test_loss_is_on_the_completion_and_a_closing_eos(tiny_tokenizer):
    (row,) = encode_completions(tiny_tokenizer, [("Question: sky? Answer:", " blue")], 64)
    (piece,) = row.pieces
    assert tiny_tokenizer.decode(piece.input_ids) == "Question: sky? Answer: blue<eos>"
    assert learnt(tiny_tokenizer, piece) == " blue<eos>"
    assert not row.is_cut


def test_a_long_prompt_loses_its_beginning_and_the_answer_stays_or_is_dropped(tiny_tokenizer):
    (row,) = encode_completions(tiny_tokenizer, [("one two one two one two Answer:", " blue")], 10)
    (piece,) = row.pieces
    assert row.is_cut
    assert len(piece.input_ids) == 10
    assert tiny_tokenizer.decode(piece.input_ids).endswith("Answer: blue<eos>")
    assert learnt(tiny_tokenizer, piece) == " blue<eos>"
    assert encode_completions(tiny_tokenizer, [("Answer:", " yes" * 20)], 10) == [DROPPED]


def test_a_long_document_is_divided_and_each_token_predicted_once(tiny_tokenizer):
    text = "What color is the sky? " * 5
    ids = [*tiny_tokenizer(text).input_ids, tiny_tokenizer.eos_token_id]
    (row,) = encode_documents(tiny_tokenizer, [text], 7)
    assert row.is_cut
    assert all(len(piece.input_ids) <= 7 for piece in row.pieces)
    assert [token for piece in row.pieces for token in piece.labels[1:]] == ids[1:]
    (row,) = encode_documents(tiny_tokenizer, [text], 640)
    assert row.pieces == (Example(tuple(ids), tuple(ids)),)


def test_the_last_answer_needs_a_token_before_it_and_bos_stays_in_front():
    assert fit(marked("..AA..AA"), [], 2) == DROPPED
    assert fit(marked("........"), [], 8) == DROPPED
    row = marked("b...AA")
    assert fit(row, [1], 4).pieces[0].input_ids == (1, 4, 5, 6)
    assert fit(row, [1], 3).pieces[0].labels == (NO_LOSS, 5, 6)
    assert fit(row, [1], 2) == DROPPED
