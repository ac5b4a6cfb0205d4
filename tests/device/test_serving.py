"""Serving on the pretend device: the CPU's texts, and waits of a decoding step."""

from itertools import cycle
from typing import Any

import pytest

from loraloom.generation.engine import Engine
from loraloom.generation.scheduler import EngineLimits
from tests.device.hosts import hosts_on
from tests.generation.asking import TEXTS, answers, request, submit
from tests.tiny import ALL_METHODS

SIZES: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 128, "eos_token_id": 2}
ADAPTERS = [*ALL_METHODS, None, "lora:0.7+moslora:0.3"]
LIMITS = EngineLimits(max_rows=16, cache_tokens=4096, prefill_tokens=64)


SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 5},
    "random": {"temperature": 1.2},
    "penalty": {"repetition_penalty": 1.8, "num_logprobs": 3, "scores_prompt": True},
    "routing": {"tells_routing": True},
}


def requests(tokenizer, adapters, settings=("greedy",), max_new_tokens=4):
    limits = {"max_new_tokens": max_new_tokens, "ignore_end": True}
    return [
        request(tokenizer, text, adapter, index, **limits, **SETTINGS[name])
        for index, (adapter, text, name) in enumerate(
            zip(adapters, cycle(TEXTS), cycle(settings), strict=False)
        )
    ]


def test_mixed_adapters_and_settings_generate_the_cpus_texts(accelerator, tiny_tokenizer):
    texts = [
        answers(Engine(host, tiny_tokenizer, LIMITS), requests(tiny_tokenizer, ADAPTERS, SETTINGS))
        for host in hosts_on(accelerator.device, **SIZES)
    ]
    for adapter, text, cpu_text in zip(ADAPTERS, *texts, strict=True):
        assert text == cpu_text, adapter


def steady_step(accelerator, tokenizer, num_layers, adapters, settings=("greedy",)):
    """Note the waits of a step in which rows are only decoded."""
    sizes = SIZES | {"num_hidden_layers": num_layers}
    configs = {name: ALL_METHODS[name] for name in ("lora", "dora", "mixlora")}
    host, _ = hosts_on(accelerator.device, configs, **sizes)
    engine = Engine(host, tokenizer, LIMITS)
    submit(engine, *requests(tokenizer, adapters, settings, max_new_tokens=12))
    while len(engine._runner.rows) < len(adapters):
        engine.step()
    engine.step()  # weights are prepared for these rows
    name = f"{num_layers} layers, {len(adapters)} rows, {settings}"
    with accelerator.step(name):
        engine.step()
    return name


@pytest.mark.parametrize(
    ("settings", "num_uploads"),
    [(["greedy"], 3), (["sampled"], 4), (["greedy", "sampled", "random", "penalty"], 7)],
)
def test_a_decoding_step_waits_as_often_for_more_layers_and_rows(
    accelerator, tiny_tokenizer, settings, num_uploads
):
    adapters = [None, "lora", "dora", "mixlora"] * 2
    small = steady_step(accelerator, tiny_tokenizer, 2, adapters, settings)
    deep = steady_step(accelerator, tiny_tokenizer, 4, adapters, settings)
    wide = steady_step(accelerator, tiny_tokenizer, 2, adapters * 2, settings)
    assert accelerator.waits(small) == accelerator.waits(deep) == accelerator.waits(wide)
    # One of the reads is that of transformers, which looks for padding.
    assert accelerator.counts(small) == {"read": 2, "upload": num_uploads}
