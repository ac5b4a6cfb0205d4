"""Large bodies are parsed in turns of keys, and errors about them are few and short."""

import json
import threading
from contextlib import suppress

import httpx2
import pytest

from benchmarks.serve_bodies import large_bodies
from loraloom.generation.request import RequestError
from loraloom.serve.http import bodies
from loraloom.serve.http.app import ApiOptions
from loraloom.serve.http.bodies import BodyParser
from loraloom.serve.http.preparation import Preparations
from loraloom.serve.http.schemas import ChatBody, CompletionBody, LoadBody, UnloadBody
from tests.serve.http.in_process import serving

MODELS = [ChatBody, CompletionBody, LoadBody, UnloadBody]


@pytest.mark.parametrize("model", MODELS)
def test_no_body_has_more_than_a_few_faults(model, monkeypatch):
    counts = {}

    def note(errors):
        counts[body.name] = len(errors)
        fault = fault_of(errors)
        assert len(f"{fault} {fault.param}") < 6000, body.name
        return fault

    fault_of = bodies.fault_of
    monkeypatch.setattr(bodies, "fault_of", note)
    parser = BodyParser(model)
    for body in large_bodies(model, 10_000):
        with suppress(RequestError):
            parser.parse(body.content)
    assert max(counts.values()) <= 20, max(counts, key=lambda name: counts[name])
    assert len(counts) > 10


def test_an_unknown_key_below_a_field_is_named():
    body = {"model": "lora", "messages": [{"role": "user"}], "stream": True}
    options = {"include_usage": True, "other": 1}
    with pytest.raises(RequestError, match="unknown key 'other'") as caught:
        BodyParser(ChatBody).parse(json.dumps(body | {"stream_options": options}).encode())
    assert caught.value.param == "stream_options"


def test_a_body_of_very_many_lists_is_refused_before_it_is_parsed():
    parser = BodyParser(CompletionBody)
    for text in (b"[" * 300_000, b'["\\"]", ' + b"{}," * 300_000 + b"1]"):
        with pytest.raises(RequestError, match=r"at most 131,072 lists and objects, got 300,00\d;"):
            parser.parse(text)
    body = {"model": "lora", "prompt": '[{"' * 300_000}
    assert parser.parse(json.dumps(body).encode()).prompt == body["prompt"]


def test_lists_that_are_too_long_name_their_limit():
    body = {"model": "lora", "messages": [{"role": "user", "content": ""}] * 32_769}
    with pytest.raises(RequestError, match=r"^messages must have at most 32,768 elements; send "):
        BodyParser(ChatBody).parse(json.dumps(body).encode())
    body = {"model": "lora", "prompt": "one", "logit_bias": dict.fromkeys(range(1001), 1)}
    with pytest.raises(RequestError, match=r"^logit_bias must have at most 1,000 elements; send"):
        BodyParser(CompletionBody).parse(json.dumps(body).encode())


def test_paths_of_adapters_are_short():
    body = {"lora_name": "a", "lora_path": "../" * 600_000}  # seconds, if links are followed
    with pytest.raises(RequestError, match=r"^lora_path must have at most 4,096 characters; sho"):
        BodyParser(LoadBody).parse(json.dumps(body).encode())


def test_bodies_are_parsed_in_turns_of_keys(host, tokenizer, monkeypatch):
    parse = BodyParser.parse
    run = Preparations.run
    threads = []
    tenants = []

    def note_thread(parser, content):
        threads.append(threading.current_thread())
        return parse(parser, content)

    async def note_tenant(preparations, tenant, work):
        loop_threads.add(threading.current_thread())
        tenants.append(tenant)
        return await run(preparations, tenant, work)

    loop_threads = set()
    monkeypatch.setattr(BodyParser, "parse", note_thread)
    monkeypatch.setattr(Preparations, "run", note_tenant)
    with serving(host, tokenizer, options=ApiOptions(api_keys=["secret-1"])) as (url, _):
        headers = {"Authorization": "Bearer secret-1"}
        body = {"model": "lora", "prompt": [-1] * 50_000}
        answer = httpx2.post(f"{url}/v1/completions", json=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("prompt")
    assert [tenant[:8] for tenant in tenants] == ["f7e7c36e"]
    assert len(threads) == 1
    assert not loop_threads & {*threads}
