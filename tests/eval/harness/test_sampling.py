from __future__ import annotations

import pytest

from loraloom.errors import ConfigError
from loraloom.eval.harness.sampling import parse_generation
from loraloom.infer.sampling import SamplingConfig


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
            {"num_beams": 3, "repetition_penalty": 1.2},
            {"max_new_tokens": 50, "num_beams": 3, "repetition_penalty": 1.2},
        ),
    ],
)
def test_settings_are_read(settings, expected):
    assert parse_generation(settings, 50) == SamplingConfig(**expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_length": 9}, "generation_kwargs may hold until, .*, got max_length"),
        ({"do_sample": True, "temperature": 0.0}, "do_sample draws at a temperature above 0"),
        ({"do_sample": True, "top_p": 2.0}, "top_p"),
    ],
)
def test_what_cannot_be_done_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse_generation(settings, 50)
