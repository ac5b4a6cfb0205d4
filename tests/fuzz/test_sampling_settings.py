"""Settings of generation, whatever they are: refused with a clear message, or tokens come out."""

from __future__ import annotations

import json
from typing import Annotated, Any

import pytest
from cyclopts import Parameter
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from loraloom.cli import main as cli
from loraloom.cli.generate import GenerateOptions
from loraloom.errors import ConfigError, LoraloomError, shown
from loraloom.generation.generate import generate_tokens
from loraloom.generation.prompts import Prompt
from loraloom.generation.sampling import SamplingConfig, parse_sampling
from tests.conftest import build_tokenizer
from tests.eval.scoring import VOCAB_SIZE, scoring_host
from tests.fuzz.harness import EXTREMES, fuzz, mutated, survives
from tests.tiny import METHODS

VALID: dict[str, st.SearchStrategy[Any]] = {
    "max_new_tokens": st.integers(1, 3) | st.sampled_from([200, 10**6, 2**63]),
    "temperature": st.sampled_from([0.0, 1e-300, 1e-45, 1e-3, 0.7, 1.0, 1e4, 1e38, 1e300]),
    "top_k": st.integers(0, 5) | st.sampled_from([VOCAB_SIZE, 10**6, 2**63, 10**30]),
    "top_p": st.floats(0, 1) | st.sampled_from([5e-324, 1e-9, 1.0]),
    "repetition_penalty": st.sampled_from([1.0, 0.01, 0.1, 2.5, 100.0, 1e-300, 1e300, 5e-324]),
    "seed": st.sampled_from([0, 1, 2**32, 2**63 - 1, 2**63]),
    "stop": st.lists(st.text(max_size=4), max_size=3).map(tuple),
}
SETTINGS = st.fixed_dictionaries({}, optional=VALID)
GREEDY = SamplingConfig()
WORDS = [f"--{name.replace('_', '-')}" for name in VALID if name != "stop"]


@pytest.fixture(scope="module")
def parts():
    host = scoring_host(configs={name: METHODS[name] for name in ("lora", "mixlora")})
    return host, build_tokenizer()


def generated(parts, sampling: SamplingConfig) -> None:
    """Complete two prompts; every token is one of the vocabulary, and there are no more than asked.

    Long completions are cut: they are right, and slow.
    """
    host, tokenizer = parts
    if sampling.max_new_tokens < 250:
        sampling = sampling.model_copy(update={"max_new_tokens": 3})
    prompts = [Prompt("the sky", "lora"), Prompt("one two", "mixlora"), Prompt("the")]
    for completion in generate_tokens(host, tokenizer, prompts, sampling):
        assert 1 <= len(completion.ids) <= sampling.max_new_tokens
        assert all(0 <= token < VOCAB_SIZE for token in completion.ids)
        assert not any(text in completion.text for text in sampling.stop)


@fuzz
@given(settings=SETTINGS | SETTINGS.flatmap(mutated))
def test_settings_in_python(parts, settings):
    if isinstance(settings, dict) and all(isinstance(name, str) for name in settings):
        survives(lambda: generated(parts, parse_sampling(**settings)))


@fuzz
@given(settings=SETTINGS | SETTINGS.flatmap(mutated))
def test_settings_in_json(parts, settings):
    def read():
        try:
            sampling = SamplingConfig.model_validate_json(json.dumps(settings))
        except ValidationError as error:
            raise ConfigError(shown(str(error))) from error
        generated(parts, sampling)

    try:
        json.dumps(settings)
    except (TypeError, ValueError):
        return
    survives(read)


@fuzz
@given(
    words=st.lists(
        st.tuples(st.sampled_from([*WORDS, "--stop"]), EXTREMES | st.one_of(*VALID.values())),
        max_size=4,
    )
)
def test_settings_in_words(parts, words):
    """The command line either refuses its words with exit code 2, or they are settings."""
    seen: list[SamplingConfig] = []

    def read(
        options: Annotated[GenerateOptions, Parameter(name="*")],
        sampling: Annotated[SamplingConfig, Parameter(name="*")] = GREEDY,
    ) -> None:
        seen.append(sampling)
        raise LoraloomError("the settings were read")

    argv = [part for option, value in words for part in (option, str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cli.VERBS, "generate", (read, "Read."))
        assert cli.main(["generate", "--base-model", "x", "--prompt", "x", *argv]) == 2
    for sampling in seen:
        survives(lambda sampling=sampling: generated(parts, sampling))
