from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from loraloom.data.tokenising import encode_pairs, encode_texts, leading_tokens
from loraloom.errors import DataError


def encode_pair(tokenizer, context, continuation):
    return encode_pairs(tokenizer, [(context, continuation)])[0]


@pytest.fixture
def bos_tokenizer(tiny_tokenizer):
    """The tiny tokenizer, which now puts BOS in front and EOS at the end."""
    bos, eos = tiny_tokenizer.bos_token_id, tiny_tokenizer.eos_token_id
    tiny_tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", bos), ("<eos>", eos)]
    )
    return tiny_tokenizer


def test_both_parts_are_the_tokens_of_the_whole_text(tiny_tokenizer):
    context, continuation = encode_pair(tiny_tokenizer, "Question: sky?\nAnswer:", " blue")
    assert context + continuation == tiny_tokenizer("Question: sky?\nAnswer: blue").input_ids
    assert tiny_tokenizer.decode(continuation) == " blue"


def test_trailing_space_of_the_context_goes_to_the_continuation(tiny_tokenizer):
    pair = encode_pair(tiny_tokenizer, "Answer: ", "blue")
    assert pair == encode_pair(tiny_tokenizer, "Answer:", " blue")


def test_a_token_over_the_cut_belongs_to_the_continuation(tiny_tokenizer):
    assert len(tiny_tokenizer("Answer").input_ids) == 1
    context, continuation = encode_pair(tiny_tokenizer, "yes Answ", "er no")
    assert context + continuation == tiny_tokenizer("yes Answer no").input_ids
    assert tiny_tokenizer.decode(context).strip() == "yes"
    assert tiny_tokenizer.decode(continuation).strip() == "Answer no"


def test_bos_is_added_once_and_eos_never(bos_tokenizer):
    bos, eos = bos_tokenizer.bos_token_id, bos_tokenizer.eos_token_id
    assert leading_tokens(bos_tokenizer) == [bos]
    for context in ("Answer:", "<bos>Answer:"):
        ids, continuation = encode_pair(bos_tokenizer, context, " yes")
        assert ids[0] == bos
        assert (ids + continuation).count(bos) == 1
        assert eos not in ids + continuation


def test_a_tokenizer_without_bos_adds_nothing(tiny_tokenizer):
    assert leading_tokens(tiny_tokenizer) == []
    assert encode_texts(tiny_tokenizer, ["yes", ""]) == [tiny_tokenizer("yes").input_ids, []]


def test_an_empty_context_is_the_token_that_begins_a_text(tiny_tokenizer, bos_tokenizer):
    context, continuation = encode_pair(tiny_tokenizer, "", "yes")
    assert context == [tiny_tokenizer.bos_token_id]
    assert tiny_tokenizer.decode(continuation) == "yes"
    assert encode_pair(bos_tokenizer, "", "yes") == (context, continuation)


def test_without_bos_and_eos_an_empty_context_is_refused(tiny_tokenizer):
    tiny_tokenizer.bos_token = None
    assert encode_pair(tiny_tokenizer, "", "yes")[0] == [tiny_tokenizer.eos_token_id]
    tiny_tokenizer.eos_token = None
    with pytest.raises(DataError, match="the tokenizer must have an EOS token"):
        encode_pair(tiny_tokenizer, "", "yes")


def test_many_pairs_are_encoded_as_each_alone(tiny_tokenizer):
    pairs = [("Question: one", " yes"), ("", "no"), ("Answer: ", "blue")]
    assert encode_pairs(tiny_tokenizer, pairs) == [encode_pair(tiny_tokenizer, *p) for p in pairs]
    assert encode_pairs(tiny_tokenizer, []) == []
