"""What the official client asks, and gets."""

import asyncio
import json
import shutil
import time
from typing import Any

import httpx2
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from loraloom import Prompt, PromptForm, RoutedConfig, SamplingConfig, fit_router, generate
from loraloom.adapters.weighted_sum import WeightedSum
from loraloom.errors import shown
from loraloom.serve.http import exchange
from tests.serve.http.in_process import BASE, serving
from tests.tiny import METHODS

MESSAGES: Any = [{"role": "user", "content": "What color is the sky?"}]
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": ["blue", "red"]}, "sure": {"type": "boolean"}},
    "required": ["color", "sure"],
    "additionalProperties": False,
}
PAINT = {
    "properties": {"color": {"$ref": "#/$defs/C"}},
    "required": ["color"],
    "additionalProperties": False,
    "$defs": {
        "C": {
            "type": "object",
            "properties": {"is": SCHEMA["properties"]["color"]},
            "required": ["is"],
            "additionalProperties": False,
        }
    },
}
FORMAT = {"type": "json_schema"}
NO_SCHEMA = {"name": "a", "schema": {"type": 3}}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}
TOOL: Any = {"type": "function", "function": {"name": "paint", "parameters": PAINT}}


def chat(client, model="lora", **settings):
    settings = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0} | settings
    return client.chat.completions.create(model=model, **settings)


def expected(host, tokenizer, model, **settings):
    prompt = Prompt(tuple(MESSAGES), None if model == BASE else model)
    sampling = SamplingConfig(**{"max_new_tokens": 12} | settings)
    return generate(host, tokenizer, [prompt], sampling)[0]


@pytest.mark.parametrize("model", [BASE, *METHODS])
def test_chats_are_what_generate_says(client, host, tokenizer, model):
    answer = chat(client, model)
    assert answer.model == model
    assert answer.choices[0].message.content == expected(host, tokenizer, model)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_an_adapter_is_asked_as_its_training_data_asked(client, host, tokenizer, monkeypatch):
    form = PromptForm(format="instruction", template="plain")
    monkeypatch.setattr(host.adapters["lora"], "prompt", form)
    raw = Prompt(f"{MESSAGES[0]['content']}\n", "lora")
    text = generate(host, tokenizer, [raw], SamplingConfig(max_new_tokens=12), raw=True)[0]
    assert chat(client).choices[0].message.content == text
    chunks = chat(client, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_a_stream_is_the_same_text_in_pieces(client, host, tokenizer):
    stream = chat(client, "mixlora", stream=True, stream_options={"include_usage": True})
    *chunks, last = list(stream)
    texts = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(texts) == expected(host, tokenizer, "mixlora")
    assert len([text for text in texts if text]) > 3
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "length"]
    assert last.choices == []
    assert last.usage.completion_tokens == 12


def test_a_stream_that_waits_sends_comments_that_clients_ignore(client, served, monkeypatch):
    text = chat(client).choices[0].message.content
    monkeypatch.setattr(exchange, "COMMENT_S", 0.0001)
    chunks = chat(client, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    body = {"model": "lora", "messages": MESSAGES, "max_tokens": 12, "stream": True}
    lines = httpx2.post(f"{served[0]}/v1/chat/completions", json=body).text.split("\n\n")
    assert ": waiting" in lines
    assert lines[-2:] == ["data: [DONE]", ""]


def test_a_seed_gives_the_draws_of_generate(client, host, tokenizer):
    settings = {"temperature": 1.0, "seed": 4}
    answers = [chat(client, "dora", n=2, **settings) for _ in range(2)]
    texts = [[choice.message.content for choice in answer.choices] for answer in answers]
    assert texts[0] == texts[1]
    assert texts[0][0] == expected(host, tokenizer, "dora", **settings)
    assert texts[0][0] != texts[0][1]
    assert len({chat(client, temperature=1.0).choices[0].message.content for _ in range(3)}) == 3


@pytest.mark.parametrize("tools", [None, [TOOL]], ids=["", "tools"])
def test_several_answers_are_streamed_side_by_side(client, tools):
    settings: Any = {"n": 3, "temperature": 1.0, "seed": 1, "tools": tools}
    whole = chat(client, **settings)
    texts = ["", "", ""]
    num_chunks = 0
    for chunk in chat(client, **settings, stream=True):
        text = chunk.choices[0].delta.content or ""
        texts[chunk.choices[0].index] += text
        num_chunks += bool(text)
    assert num_chunks > 2 * len(texts)
    assert texts == [choice.message.content for choice in whole.choices]


def test_chats_tell_log_probabilities(client, host, tokenizer):
    entries = chat(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert len(entries) == 12
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
    chunks = chat(client, logprobs=True, top_logprobs=2, stream=True)
    told = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [entry for one in told if one is not None for entry in one.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_completions_continue_texts_and_tokens(client, host, tokenizer):
    prompts = ["the sky", "Please choose"]
    sampling = SamplingConfig(max_new_tokens=6)
    asked = [Prompt(prompt, "lora") for prompt in prompts]
    texts = generate(host, tokenizer, asked, sampling, raw=True)
    for prompt in (prompts, [tokenizer(prompt)["input_ids"] for prompt in prompts]):
        answer = client.completions.create(model="lora", prompt=prompt, max_tokens=6, temperature=0)
        assert [choice.text for choice in answer.choices] == texts
        assert answer.usage.completion_tokens == 12


def test_completions_stream_and_stop(client):
    settings: Any = {"model": "lora", "prompt": "the sky", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**settings).choices[0].text
    stop = next(whole[at : at + 2] for at in range(5, 40) if whole[at : at + 2].isascii())
    stream = client.completions.create(**settings, stop=[stop], stream=True)
    pieces = [chunk.choices[0] for chunk in stream]
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"


def test_echo_scores_the_prompt_as_lm_eval_asks_for_it(client, host, tokenizer):
    rows = [tokenizer(text)["input_ids"] for text in ("the sky is blue", "Please choose one", "a")]
    answer = client.completions.create(
        model="mixlora", prompt=rows, max_tokens=1, temperature=0, logprobs=1, echo=True, n=2
    )
    for choice, ids in zip(answer.choices, [ids for ids in rows for _ in range(2)], strict=True):
        told = choice.logprobs
        logits = host(torch.tensor([ids]), adapters=["mixlora"]).logits[0].detach()
        expected = logits.log_softmax(-1)
        assert choice.text.startswith(tokenizer.decode(ids))
        assert told.token_logprobs[0] is None
        assert len(told.tokens) == len(ids) + 1
        picked = [float(expected[at, token]) for at, token in enumerate(ids[1:])]
        assert told.token_logprobs[1:-1] == pytest.approx(picked, abs=1e-4)
        best = expected.max(-1).values.tolist()
        assert [max(top.values()) for top in told.top_logprobs[1:]] == pytest.approx(best, abs=1e-4)


def test_tokens_that_are_no_characters_are_all_told(client, tokenizer):
    halves = tokenizer.convert_tokens_to_ids(["\u00e2", "\u00ac", "\u0124"])
    settings = {"logprobs": 3, "max_tokens": 1, "logit_bias": dict.fromkeys(halves, 100)}
    told = client.completions.create(model="lora", prompt="one", **settings).choices[0].logprobs
    assert told.tokens[0] in {r"bytes:\xe2", r"bytes:\xac", r"bytes:\x82"}
    bytes_of_all = tokenizer.convert_tokens_to_ids([*map(chr, range(174, 256))])
    echoed = client.completions.create(
        model="lora", prompt=bytes_of_all, logprobs=20, max_tokens=1, echo=True
    )
    assert {len(top) for top in echoed.choices[0].logprobs.top_logprobs[1:]} == {20}


def test_echo_without_new_tokens_scores_the_prompt_alone(client):
    settings: Any = {"model": "mixlora", "logprobs": 2, "echo": True, "temperature": 0}
    for prompt in ("the sky is blue", [5] * 256):  # the latter as long as may be
        (scored,) = client.completions.create(prompt=prompt, max_tokens=0, **settings).choices
        assert scored.finish_reason == "length"
        assert len(scored.logprobs.tokens) == len(scored.logprobs.top_logprobs)
        assert scored.logprobs.token_logprobs[0] is None
    answer = client.completions.create(prompt="the sky is blue", max_tokens=0, n=2, **settings)
    longer = client.completions.create(prompt="the sky is blue", max_tokens=1, **settings)
    assert answer.usage.completion_tokens == 0
    for choice in answer.choices:
        assert choice.text == "the sky is blue"
        assert choice.logprobs.token_logprobs == longer.choices[0].logprobs.token_logprobs[:-1]
    (unscored,) = client.completions.create(
        model="lora", prompt="the sky", max_tokens=0, echo=True
    ).choices
    assert (unscored.text, unscored.logprobs) == ("the sky", None)
    with pytest.raises(openai.BadRequestError, match="max_tokens must be at least 1, or echo true"):
        client.completions.create(model="lora", prompt="the sky", max_tokens=0)


def test_the_base_model_has_the_names_that_it_is_served_by(host, tokenizer, saved, tmp_path):
    shutil.copytree(saved / "lazy-lora", tmp_path / "second")
    with (
        serving(host, tokenizer, tmp_path, base="first", base_aliases=["second"]) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        assert [model.id for model in client.models.list()][:2] == ["first", "second"]
        assert client.models.retrieve("second").parent is None
        answers = [chat(client, model) for model in ("first", "second")]
        assert [answer.model for answer in answers] == ["first", "first"]
        (text,) = {answer.choices[0].message.content for answer in answers}
        assert text == expected(host, tokenizer, BASE)


def test_models_are_the_base_and_its_adapters(client, saved):
    models = {model.id: model for model in client.models.list()}
    assert set(models) == {BASE, *METHODS, "lazy-lora", "lazy-mixlora"}
    assert models["lazy-lora"].parent == BASE
    assert str(saved) not in str(models)
    assert client.models.retrieve(BASE).parent is None
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_models_have_revisions_once_they_are_loaded(client, host, saved):
    shutil.copytree(saved / "lazy-lora", directory := saved / "revised")
    model = client.models.retrieve("revised")
    assert (model.loaded, model.revision) == (False, None)
    revisions = set()
    for name in ("lora", "mixlora"):
        host.save(name, directory, overwrite=True)
        chat(client, "revised", max_tokens=1)
        model = client.models.retrieve("revised")
        assert model.loaded
        revisions.add(model.revision)
    assert len(revisions - {None}) == 2
    shutil.rmtree(directory)


def test_metrics_forget_adapters_that_are_gone(client, served, saved):
    load = {"lora_name": "gone", "lora_path": str(saved / "lazy-lora")}
    client.post("/load_lora_adapter", body=load, cast_to=str)
    with chat(client, "gone", stream=True, max_tokens=100) as stream:
        next(iter(stream))
        client.post("/unload_lora_adapter", body={"lora_name": "gone"}, cast_to=str)
        assert 'model="gone"' in httpx2.get(f"{served[0]}/metrics").text  # it is in use
    while 'model="gone"' in (text := httpx2.get(f"{served[0]}/metrics").text):
        time.sleep(0.01)
    assert 'loraloom_requests_total{model="lora"' in text
    assert served[1].counts["requests", "gone", "cancelled"] == 0


def test_an_answer_keeps_to_a_json_schema(client):
    schema: Any = FORMAT | {"json_schema": {"name": "sky", "schema": SCHEMA}}
    for seed in range(3):
        answer = chat(client, response_format=schema, max_tokens=100, temperature=1.0, seed=seed)
        said = json.loads(answer.choices[0].message.content)
        assert said["color"] in ("blue", "red")
        assert isinstance(said["sure"], bool)
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("named", [True, False])
def test_an_answer_may_have_to_be_a_call_of_a_tool(client, named):
    no_more = {"name": "wait", "parameters": {"additionalProperties": False}}
    other: Any = {"type": "function", "function": no_more}
    choice = {"type": "function", "function": {"name": "paint"}} if named else "required"
    settings: Any = {"tools": [other, TOOL], "tool_choice": choice, "max_tokens": 120}
    (answer,) = chat(client, **settings).choices
    (call,) = answer.message.tool_calls
    assert answer.message.content is None
    assert answer.finish_reason == "tool_calls"
    assert call.function.name in ("paint", "wait")[: 2 - named]
    arguments = json.loads(call.function.arguments)
    assert arguments == {} or arguments["color"]["is"] in ("blue", "red")
    chunks = [chunk.choices[0] for chunk in chat(client, **settings, stream=True)]
    (streamed,) = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
    assert streamed.function.model_dump() == call.function.model_dump()
    assert chunks[-1].finish_reason == "tool_calls"
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""


def test_metrics_count_by_model(client, served):
    for _ in range(3):
        chat(client, "mixlora", max_tokens=20)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(httpx2.get(f"{served[0]}/metrics").text)
        for sample in family.samples
    }
    assert samples["loraloom_requests_total", "mixlora", "length"] >= 3
    assert samples["loraloom_generated_tokens_total", "mixlora"] >= 60
    assert samples["loraloom_time_to_first_token_seconds_count", "mixlora"] >= 3
    assert samples["loraloom_cache_tokens",] == 4096
    assert samples["loraloom_cache_tokens_used",] == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 300}, "maximum context length is 256 tokens"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": "a " * 600}]},
            "maximum context length is 256 tokens",
        ),
        ({"top_logprobs": 2}, "top_logprobs requires logprobs"),
        ({"tool_choice": "auto"}, "the body: tool_choice requires tools"),
        ({"stream_options": {"include_usage": True}}, "stream_options requires stream: true"),
        ({"max_tokens": 5, "max_completion_tokens": 9}, "exclude each other"),
        (
            {"tools": [TOOL], "tool_choice": "required"}
            | {"response_format": FORMAT | {"json_schema": NO_SCHEMA}},
            "response_format must be text if tool_choice requires a call",
        ),
        ({"extra_body": {"temprature": 1}}, "did you mean 'temperature'"),
        ({"logit_bias": {"5000": 1}}, "logit_bias: token ids must be below"),
        ({"n": 0}, "n"),
        ({"stop": ["", "b"]}, "stop.0: String should have at least 1 character"),
        ({"messages": [IMAGE]}, "messages.0.content.0"),
        ({"response_format": FORMAT | {"json_schema": NO_SCHEMA}}, "JSON schema can't be used"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_requests_are_refused_with_a_reason(client, settings, message):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **settings)
    assert message in caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


def test_a_scale_behind_the_name_scales_the_adapter(client, host, tokenizer):
    texts = []
    for model, adapter in {"mixlora:0.25": ("mixlora", 0.25), "lora:1": "lora"}.items():
        answer = chat(client, model)
        assert answer.model == model
        texts.append(answer.choices[0].message.content)
        asked = [Prompt(tuple(MESSAGES), adapter)]
        assert generate(host, tokenizer, asked, SamplingConfig(max_new_tokens=12)) == texts[-1:]
    assert texts[0] != chat(client, "mixlora").choices[0].message.content
    for model in ("lora:", "lora:x", "lora:nan", "lora:1e9", "lora:2+dora:11", f"{BASE}:2"):
        with pytest.raises(openai.BadRequestError, match=r"-10 to 10|finite|of adapters"):
            chat(client, model)


def test_a_sum_of_adapters_answers_and_lets_them_go(client, host, tokenizer, monkeypatch):
    def made(*arguments):
        assert asyncio._get_running_loop() is None  # which all others would wait for
        return WeightedSum(*arguments)

    monkeypatch.setattr("loraloom.host.registry.WeightedSum", made)
    for model in ("lora:0.5+dora:-1", "lazy-lora:0.5+dora:-1", "lora+dora:0"):
        answer = chat(client, model)
        assert answer.model == model
        asked = [Prompt(tuple(MESSAGES), model.removeprefix("lazy-"))]
        text = answer.choices[0].message.content
        assert generate(host, tokenizer, asked, SamplingConfig(max_new_tokens=12)) == [text]
    messages = {
        "lora+mixlora": "supports adapters without routers",
        "lora+lora": "of 1 to 16 different ones",
    }
    for model, message in messages.items():
        with pytest.raises(openai.BadRequestError, match=message):
            chat(client, model)
    with pytest.raises(openai.NotFoundError):
        chat(client, "lora+law")


def test_an_answer_says_which_adapter_a_router_chose(client, served, host, tokenizer, saved):
    host.add("made", RoutedConfig(experts={"law": "lora", "math": "mixlora"}))
    prompts = {"law": ["the court is", "a court"], "math": ["one two", "two one"]}
    fit_router(host, tokenizer, "made", prompts)
    host.save("made", saved / "auto")
    host.remove("made")
    assert not hasattr(chat(client, "auto/law").choices[0], "chosen")
    for text, expert, adapter in [("a court", "law", "lora"), ("two one", "math", "mixlora")]:
        messages = [{"role": "user", "content": text}]
        answer = chat(client, "auto", messages=messages).choices[0]
        assert answer.chosen["adapter"] == expert
        assert max(answer.chosen["probabilities"], key=answer.chosen["probabilities"].get) == expert
        assert answer.chosen["because"].strip() in text
        alone = chat(client, adapter, messages=messages).choices[0]
        assert answer.message.content == alone.message.content
    messages = [{"role": "user", "content": "two one"}]
    pieces = [*chat(client, "auto", messages=messages, stream=True)]
    assert [hasattr(piece.choices[0], "chosen") for piece in pieces][:2] == [True, False]
    assert pieces[0].choices[0].chosen["adapter"] == "math"
    with pytest.raises(openai.BadRequestError, match="its experts, auto/law, auto/math"):
        chat(client, "lora+auto:0.5")
    for model in ("auto/x", "auto/law+lora/y", "auto/"):
        with pytest.raises(openai.NotFoundError):
            chat(client, model)


def test_what_the_client_adds_to_an_answer_may_be_sent_back(client):
    called = {"name": "paint", "arguments": "{}", "parsed_arguments": {"a": 1}}
    call = {"id": "1", "type": "function", "index": 0, "function": called}
    answer = {"role": "assistant", "content": "one", "parsed": {"b": 2}, "tool_calls": [call]}
    messages = [MESSAGES[0], answer, {"role": "tool", "tool_call_id": "1", "content": "x"}]
    texts = [chat(client, messages=messages).choices[0].message.content]
    del answer["parsed"], call["index"], called["parsed_arguments"]
    texts.append(chat(client, messages=messages).choices[0].message.content)
    assert texts[0] == texts[1]


def test_null_is_as_if_a_field_were_not_there(client):
    unset = dict.fromkeys(("temperature", "top_p", "n", "presence_penalty", "logprobs", "stream"))
    unset["service_tier"] = None  # nor a name that is not known
    left_out, given = chat(client, seed=1, extra_body=unset), chat(client, seed=1, temperature=1)
    assert left_out.choices[0].message.content == given.choices[0].message.content


@pytest.mark.parametrize(
    "model", ["nobody", "meta-llama/Llama-3", "lora/../lora", "LORA", "a" * 300]
)
def test_an_unknown_model_is_not_found(client, model):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model)
    assert caught.value.body["code"] == "model_not_found"
    assert shown(model) in caught.value.body["message"]
