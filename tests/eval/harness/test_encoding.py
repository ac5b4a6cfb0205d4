from __future__ import annotations

import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

from loraloom.data.tokenising import TokenPair
from loraloom.errors import ConfigError
from loraloom.eval.harness.encoding import RequestEncoder
from tests.conftest import build_tokenizer
from tests.eval.scoring import scoring_host

PAIRS = [
    ("Question: yes or no?\nAnswer:", " yes"),
    ("Question: yes or no?\nAnswer: \n", "no"),
    ("<bos>user: yes or no?", " no"),
    ("", " yes"),
    ("", "<bos>yes"),
    ("the s", "ky is blue"),
]


def tokenizer_with(*special: str):
    """The tiny tokenizer, which puts these around every text."""
    tokenizer = build_tokenizer()
    front, _, back = " ".join([*special]).partition("$")
    tokens = [*front.split(), "$A", *back.split()]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=" ".join(tokens), special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize("special", [("$",), ("<bos>", "$")])
@pytest.mark.parametrize("add_bos_token", [None, False])
def test_pairs_are_encoded_as_in_lm_evals_own_class(special, add_bos_token):
    tokenizer = tokenizer_with(*special)
    theirs = HFLM(
        pretrained=scoring_host(configs={}).model,
        tokenizer=tokenizer,
        add_bos_token=add_bos_token,
    )
    seen = []
    theirs._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    instances = [type("Request", (), {"args": pair, "task_name": None}) for pair in PAIRS]
    theirs.loglikelihood(instances, disable_tqdm=True)
    ours = RequestEncoder(tokenizer, add_bos_token).encode_pairs(PAIRS)
    assert ours == [TokenPair(context, rest) for _, context, rest in seen]


def test_bos_stands_in_front_once():
    encoder = RequestEncoder(tokenizer_with("<bos>", "$"))
    (plain,), (begun,) = encoder.encode(["the sky"]), encoder.encode(["<bos>the sky"])
    assert plain == begun
    assert plain.count(1) == 1


def test_bos_can_be_asked_for_where_the_tokenizer_adds_none():
    encoder = RequestEncoder(build_tokenizer(), add_bos_token=True)
    (ids,) = encoder.encode(["the sky"])
    assert ids[0] == 1
    assert encoder.encode(["<bos>the sky"]) == [ids]


def test_no_eos_is_added():
    (pair,) = RequestEncoder(tokenizer_with("<bos>", "$", "<eos>")).encode_pairs([("a", " yes")])
    assert 2 not in pair.context + pair.continuation
    assert pair.context[0] == 1


def test_a_text_that_is_one_token_is_scored_whole():
    tokenizer = build_tokenizer()
    (whole,) = tokenizer("Question")["input_ids"]
    encoder = RequestEncoder(tokenizer)
    assert encoder.encode_pairs([("Questio", "n")]) == [TokenPair([1], [whole])]
    context, continuation = encoder.encode_pairs([("a Questio", "n")])[0]
    assert context + continuation == tokenizer("a Question")["input_ids"]
    assert continuation


def test_a_blank_context_is_as_none():
    encoder = RequestEncoder(build_tokenizer())
    assert encoder.encode_pairs([(" ", "yes")]) == encoder.encode_pairs([("", " yes")])


def test_another_prefix_can_stand_for_an_empty_context():
    encoder = RequestEncoder(build_tokenizer(), prefix_token_id=2)
    assert encoder.encode_pairs([("", "yes")])[0].context == [2]


def test_eos_stands_for_an_empty_context_where_there_is_no_bos():
    tokenizer = build_tokenizer()
    tokenizer.bos_token = None
    assert RequestEncoder(tokenizer).prefix_token_id == 2
    with pytest.raises(ConfigError, match="add_bos_token needs a tokenizer with a BOS token"):
        RequestEncoder(tokenizer, add_bos_token=True)
