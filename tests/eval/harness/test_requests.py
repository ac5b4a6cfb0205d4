import pytest
from tokenizers.processors import TemplateProcessing

from loraloom.errors import ConfigError
from loraloom.eval.harness.lm import HostLM, parse_generation
from loraloom.generation.sampling import SamplingConfig
from tests.conftest import build_tokenizer
from tests.eval.harness.toy import instances
from tests.eval.scoring import scoring_host


def test_bos_stands_in_front_once():
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    lm = HostLM(scoring_host(configs={}), tokenizer)
    assert lm.tok_encode("the sky").count(1) == 1
    assert lm.tok_encode("<bos>the sky").count(1) == 1


def test_a_prefix_stands_for_an_empty_or_blank_context():
    host, tokenizer = scoring_host(configs={}), build_tokenizer()
    lm = HostLM(host, tokenizer)
    pairs = [("", " yes"), (" ", "yes")]
    (empty, _), (blank, _) = lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    rest = tokenizer(" yes")["input_ids"]
    expected = lm._loglikelihood_tokens([(None, [1], rest)], disable_tqdm=True)
    assert empty == blank == expected[0][0]


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
        ({"repetition_penalty": 1.2}, {"max_new_tokens": 50, "repetition_penalty": 1.2}),
    ],
)
def test_generation_settings_are_read(settings, expected):
    assert parse_generation(settings, 50) == SamplingConfig(**expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 9}, "unknown key 'max_length'"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample requires temperature above 0"),
        ({"do_sample": True, "top_p": 2.0}, "top_p"),
    ],
)
def test_generation_that_cannot_be_done_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_generation(settings, 50)
