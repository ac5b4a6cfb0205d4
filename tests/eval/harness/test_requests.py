from __future__ import annotations

import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers.processors import TemplateProcessing

from loraloom.data.tokens import TokenPair
from loraloom.errors import ConfigError
from loraloom.eval.harness.lm import HostLM, parse_generation
from loraloom.generation.sampling import SamplingConfig
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


def host_lm(tokenizer, **options) -> HostLM:
    return HostLM(scoring_host(configs={}), tokenizer, **options)


def encoded(lm: HFLM, pairs=PAIRS) -> list[TokenPair]:
    """Contexts and continuations as they go to the model."""
    seen = []
    lm._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    instances = [type("Request", (), {"args": pair, "task_name": None}) for pair in pairs]
    lm.loglikelihood(instances, disable_tqdm=True)
    return [TokenPair(context, rest) for _, context, rest in seen]


@pytest.mark.parametrize("special", [("$",), ("<bos>", "$")])
@pytest.mark.parametrize("add_bos_token", [None, False])
def test_pairs_are_encoded_as_in_lm_evals_own_class(special, add_bos_token):
    tokenizer = tokenizer_with(*special)
    theirs = HFLM(
        pretrained=scoring_host(configs={}).model,
        tokenizer=tokenizer,
        add_bos_token=add_bos_token,
    )
    assert encoded(host_lm(tokenizer, add_bos_token=add_bos_token)) == encoded(theirs)


def test_bos_stands_in_front_once():
    lm = host_lm(tokenizer_with("<bos>", "$"))
    assert lm.tok_encode("the sky") == lm.tok_encode("<bos>the sky")
    assert lm.tok_encode("the sky").count(1) == 1


def test_bos_can_be_asked_for_where_the_tokenizer_adds_none():
    lm = host_lm(build_tokenizer(), add_bos_token=True)
    assert lm.tok_encode("the sky")[0] == 1
    assert lm.tok_encode("<bos>the sky") == lm.tok_encode("the sky")


def test_no_eos_is_added():
    (pair,) = encoded(host_lm(tokenizer_with("<bos>", "$", "<eos>")), [("a", " yes")])
    assert 2 not in pair.context + pair.continuation
    assert pair.context[0] == 1


def test_a_text_that_is_one_token_is_scored_whole():
    tokenizer = build_tokenizer()
    (whole,) = tokenizer("Question")["input_ids"]
    assert encoded(host_lm(tokenizer), [("Questio", "n")]) == [TokenPair([1], [whole])]
    context, continuation = encoded(host_lm(tokenizer), [("a Questio", "n")])[0]
    assert context + continuation == tokenizer("a Question")["input_ids"]
    assert continuation


def test_a_blank_context_is_as_none():
    lm = host_lm(build_tokenizer())
    assert encoded(lm, [(" ", "yes")]) == encoded(lm, [("", " yes")])


def test_another_prefix_can_stand_for_an_empty_context():
    (pair,) = encoded(host_lm(build_tokenizer(), prefix_token_id=2), [("", "yes")])
    assert pair.context == [2]


def test_eos_stands_for_an_empty_context_where_there_is_no_bos():
    tokenizer = build_tokenizer()
    tokenizer.bos_token = None
    assert host_lm(tokenizer).prefix_token_id == 2
    with pytest.raises(ConfigError, match="add_bos_token needs a tokenizer with a BOS token"):
        host_lm(tokenizer, add_bos_token=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"max_new_tokens": 50}),
        ({"until": "\n"}, {"max_new_tokens": 50, "stop": ("\n",)}),
        ({"until": ["a", "", "b", "a"]}, {"max_new_tokens": 50, "stop": ("a", "b")}),
        ({"max_gen_toks": 7}, {"max_new_tokens": 7}),
        ({"max_new_tokens": 8}, {"max_new_tokens": 8}),
        ({"do_sample": False, "temperature": 0.0, "top_p": 0.9}, {"max_new_tokens": 50}),
        ({"do_sample": True}, {"max_new_tokens": 50, "temperature": 1.0}),
        ({"temperature": 0.7}, {"max_new_tokens": 50, "temperature": 0.7}),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
            {"max_new_tokens": 50, "temperature": 0.7, "top_p": 0.9, "top_k": 5},
        ),
        (
            {"repetition_penalty": 1.2},
            {"max_new_tokens": 50, "repetition_penalty": 1.2},
        ),
    ],
)
def test_generation_settings_are_read(settings, expected):
    assert parse_generation(settings, 50) == SamplingConfig(**expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 9}, "unknown key 'max_length'"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample draws at a temperature above 0"),
        ({"do_sample": True, "top_p": 2.0}, "top_p"),
    ],
)
def test_generation_that_cannot_be_done_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_generation(settings, 50)
