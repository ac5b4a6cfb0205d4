"""Adapters on a base model's experts, which share the server's batches with their sums."""

import asyncio

import openai
import torch

from loraloom import Prompt, SamplingConfig, generate
from tests.generation.conftest import SIZES
from tests.serve.http.in_process import BASE, serving
from tests.tiny import ON_EXPERTS, tiny_host

CONFIGS = {name: ON_EXPERTS[name] for name in ("lora", "rslora", "shared", "dora", "mixlora")}
MODELS = [
    *CONFIGS,
    "lora:0.7+rslora:-0.3",
    "lora:0.25+rslora:0.5",
    "dora:0.5+shared",
    "lora:0.5",
    BASE,
]


def test_a_batch_of_adapters_and_sums_says_what_each_says_alone(tokenizer, monkeypatch):
    host = tiny_host("qwen3_moe", CONFIGS, torch.float32, **SIZES)
    batches = []
    decode = host.decode

    def watched(session, *arguments):
        batches.append(set(session.adapters))
        return decode(session, *arguments)

    monkeypatch.setattr(host, "decode", watched)

    async def ask_all(address):
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            settings = {"prompt": "The sky is", "max_tokens": 24, "temperature": 0}
            asked = [client.completions.create(model=model, **settings) for model in MODELS]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    with serving(host, tokenizer, max_rows=len(MODELS)) as (address, _):
        texts = asyncio.run(ask_all(address))
    assert max(map(len, batches)) > len(MODELS) // 2
    greedy = SamplingConfig(max_new_tokens=24, temperature=0)
    for model, text in zip(MODELS, texts, strict=True):
        prompt = Prompt("The sky is", None if model == BASE else model)
        assert generate(host, tokenizer, [prompt], greedy, raw=True) == [text], model
    assert len(set(texts)) == len(MODELS)
