"""What clients do wrong, by mistake or on purpose, and what the server makes of it."""

import asyncio
import json
import logging
import re
import shutil
import socket
import threading
import time
from typing import Any

import httpx2
import openai
import pytest

from loraloom.errors import ConfigError, not_finite
from loraloom.serve.http.app import ApiOptions
from loraloom.serve.http.exchange import as_events
from loraloom.serve.http.guards import answer_to
from loraloom.serve.http.server import listen
from loraloom.serve.process import LineFormatter
from tests.serve.http.in_process import BASE, serving

CHAT: Any = {"model": "lora", "messages": [{"role": "user", "content": "one"}], "max_tokens": 4}
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def http(served):
    with httpx2.Client(base_url=served[0], timeout=30) as http:
        yield http


def post(http, body, path="/v1/chat/completions", **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http.post(path, content=content, headers=JSON | headers)


def wait_until(is_so, seconds=60):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "body"),
        (b"{", "the body must be JSON"),
        (b"\xff\xfe", "body"),
        (b"[]", "body"),
        (b"null", "body"),
        (b"[" * 100_000, "body"),
        (
            b'{"model": "lora", "messages": [{"role": "user", "content": "\\ud800"}]}',
            "messages: the prompt must be a text of Unicode",
        ),
        (json.dumps(CHAT | {"temperature": float("nan")}).encode(), "temperature"),
        (json.dumps(CHAT | {"seed": 10**30}).encode(), "seed"),
        (json.dumps(CHAT | {"max_tokens": -1}).encode(), "max_tokens"),
        (json.dumps(CHAT | {"temperature": "1"}).encode(), "temperature"),
        (json.dumps(CHAT | {"n": True}).encode(), "n"),
        (json.dumps(CHAT | {"stream": "yes"}).encode(), "stream"),
        (json.dumps(CHAT | {"messages": [{"role": "wizard", "content": ""}]}).encode(), "role"),
        (json.dumps(CHAT | {"model": ["lora"]}).encode(), "model"),
        (json.dumps(CHAT | {"tools": [{"type": "x"}]}).encode(), "tools"),
    ],
    ids=str,
)
def test_bodies_that_can_not_be_read_are_refused(http, body, message):
    assert message in error_of(post(http, body), 400)["message"]


def test_a_body_that_is_too_large_is_refused(http):
    large = CHAT | {"messages": [{"role": "user", "content": "a" * 10_000_000}]}
    assert "at most 2,097,152 bytes" in error_of(post(http, large), 413)["message"]

    def chunks():
        for _ in range(10):
            yield b" " * 1_000_000

    error_of(http.post("/v1/chat/completions", content=chunks(), headers=JSON), 413)


def test_paths_can_not_be_used_to_load_from_elsewhere(http, tmp_path):
    for body in (
        {"lora_name": "../x", "lora_path": str(tmp_path)},
        {"lora_name": "x", "lora_path": str(tmp_path)},
        {"lora_name": "x", "lora_path": "\x00"},
        {"lora_name": BASE, "lora_path": "x"},
        {"lora_name": "x", "lora_path": "x" * 5000},
    ):
        error_of(post(http, body, "/v1/load_lora_adapter"), 400)
    error_of(post(http, {"lora_name": "nobody"}, "/v1/unload_lora_adapter"), 404)


def test_a_local_server_answers_to_its_own_names_alone(http):
    for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert http.get("/v1/models", headers={"Host": name}).status_code == 200
    for name in ("evil.example", "evil.example:80", "127.0.0.1.evil", "", "[::2]"):
        error = error_of(http.get("/v1/models", headers={"Host": name}), 400)
        assert "the Host header must be of localhost, 127.0.0.1" in error["message"]
    assert 'loraloom_http_responses_total{path="other",status="400"}' in http.get("/metrics").text


def test_a_local_server_answers_to_the_address_that_it_listens_on(host, tokenizer):
    with serving(host, tokenizer, options=ApiOptions(host="127.0.0.2")) as (url, _):
        headers = {"Host": "127.0.0.2:8000"}
        assert httpx2.get(f"{url}/v1/models", headers=headers, timeout=30).status_code == 200


def test_other_paths_are_errors_with_an_object(http):
    error_of(http.get("/v1/nothing"), 404)
    error_of(http.get("/v1/chat/completions"), 405)
    for path in ("/health", "/ready"):  # a probe may ask for the head alone
        assert (http.get(path).text, http.head(path).content) == ("ok", b"")


def test_a_server_answers_to_the_names_that_it_is_given(host, tokenizer):
    options = ApiOptions(host="0.0.0.0", allowed_hosts=["llm.example", "*.in.example"])
    names = {"llm.example:443": 200, "a.in.example": 200, "localhost": 200, "evil.example": 400}
    with serving(host, tokenizer, options=options) as (url, _):
        for name, status in names.items():
            response = httpx2.get(f"{url}/v1/models", headers={"Host": name})
            assert response.status_code == status, name


def test_keys_are_asked_for(host, tokenizer):
    options = ApiOptions(api_keys=("secret-1", "secret-2"))
    with serving(host, tokenizer, options=options) as (url, _):
        assert httpx2.get(f"{url}/health").status_code == 200
        for given in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "Basic secret-1"}):
            response = httpx2.post(f"{url}/v1/chat/completions", json=CHAT, headers=given)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            for path in ("v1/models", "docs"):
                assert httpx2.get(f"{url}/{path}", headers=given).status_code == 401
        for key in options.api_keys:
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key) as client:
                assert client.models.list().data
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_the_log_says_who_asked_which_model_and_for_how_much(host, tokenizer, caplog):
    caplog.set_level(logging.INFO)
    headers, request_ids = {"Authorization": "Bearer secret-1"}, []
    with serving(host, tokenizer, options=ApiOptions(api_keys=("secret-1",))) as (url, _):
        path = f"{url}/v1/chat/completions"
        for sent in ("trace-1:a", "no good", "a" * 65):
            headers["X-Request-Id"] = sent
            body = CHAT | {"stream": sent == "no good", "ignore_eos": True}
            answer = httpx2.post(path, json=body, headers=headers)
            request_ids.append(answer.headers["x-request-id"])
        request_ids.append(httpx2.post(path).headers["x-request-id"])
        httpx2.get(f"{url}/health")
    assert request_ids[0] == "trace-1:a"
    assert all(name.startswith("req_") for name in request_ids[1:])
    assert all(f"request {name}" in caplog.text for name in request_ids)
    asked = r'127\.0\.0\.1:\d+ "POST /v1/chat/completions" 200, \d+\.\d\d s, request \S+'
    usage = r"key f7e7c36e, model 'lora', [1-9]\d* tokens in, 4 out\n"
    assert len(re.findall(f"{asked}, {usage}", caplog.text)) == 3
    assert re.search(r'"GET /health" 200, \d+\.\d\d s, request req_\w{32}\n', caplog.text)
    assert "secret-1" not in caplog.text


def test_no_text_of_a_client_makes_a_line_of_the_log(host, tokenizer, caplog):
    forged = '2026-12-02 00:00:00,000 INFO 10.9.9.9:1 "POST /v1/unload_lora_adapter" 200'
    with serving(host, tokenizer, options=ApiOptions(allow_loading=True)) as (url, _):
        caplog.set_level(logging.INFO)
        load(url, "none", f"no\n{forged}", name="new")
        httpx2.post(f"{url}/v1/chat/completions", json=CHAT | {"model": f"no\r\n{forged}"})
        httpx2.get(f"{url}/v1/models/{'a' * 30_000}?{'b' * 30_000}")
    try:
        raise ValueError(f"\x1b[2J\n{forged}")
    except ValueError:
        logging.getLogger("loraloom").exception("a request failed\n%s", forged)
    records = [record for record in caplog.records if record.name.startswith("loraloom")]
    lines = [line for record in records for line in LineFormatter().format(record).split("\n")]
    assert any(forged in line for line in lines)
    assert not [line for line in lines if line.startswith(forged)]
    assert all(line.isprintable() for line in lines)
    assert max(map(len, lines)) < 1000


def load(url, key, path, name="new"):
    body = {"lora_name": name, "lora_path": str(path), "load_inplace": True}
    headers = {"Authorization": f"Bearer {key}"}
    return httpx2.post(f"{url}/v1/load_lora_adapter", json=body, headers=headers)


def test_loading_needs_an_admins_key(host, tokenizer, saved):
    options = ApiOptions(api_keys=["user"], admin_keys=["admin"], allow_loading=True)
    with serving(host, tokenizer, options=options) as (url, _):
        assert load(url, "nobody", saved / "lazy-lora").status_code == 401
        assert error_of(load(url, "user", saved / "lazy-lora"), 403)["code"] == "not_an_admin"
        assert load(url, "admin", saved / "lazy-lora").status_code == 200
        headers = {"Authorization": "Bearer admin"}
        assert httpx2.get(f"{url}/v1/models", headers=headers).status_code == 200


def test_adapters_are_loaded_from_below_the_root_alone(host, tokenizer, saved, tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for directory in (root / "inside", outside):
        shutil.copytree(saved / "lazy-lora", directory)
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    (root / "files" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    options = ApiOptions(allow_loading=True, adapter_root=root)
    with serving(host, tokenizer, options=options) as (url, _):
        for path in (root / "inside", "inside", "./inside/../inside"):
            assert load(url, "none", path).status_code == 200
        elsewhere = [outside, "../outside", "link", "files", "/nowhere", "none", "some/adapter"]
        messages = {
            error_of(load(url, "none", path), 400)["message"].replace(str(path), "")
            for path in (*elsewhere, "\0")
        }
    assert len({message.partition(", got")[0] for message in messages}) == 1


def test_where_files_are_is_not_told(host, tokenizer, saved, tmp_path, caplog):
    broken = tmp_path / "here" / "broken"
    shutil.copytree(saved / "lazy-lora", broken)
    (broken / "adapter_model.safetensors").write_bytes(b"none")
    options = ApiOptions(allow_loading=True, adapter_root=broken.parent)
    caplog.set_level(logging.INFO)
    with serving(host, tokenizer, broken.parent, options) as (url, _):
        asked = httpx2.post(f"{url}/v1/chat/completions", json=CHAT | {"model": "broken"})
        assert error_of(asked, 500)["code"] == "broken_adapter"
        for answer in (asked, load(url, "none", "broken"), httpx2.get(f"{url}/v1/models")):
            assert str(tmp_path) not in answer.text
        assert "adapter_model.safetensors" in error_of(load(url, "none", "broken"), 400)["message"]
    assert str(broken) in caplog.text


def test_loading_and_foreign_pages_are_off_by_default(host, tokenizer):
    with serving(host, tokenizer) as (url, _):
        assert load(url, "none", "x").status_code == 404
        response = httpx2.get(f"{url}/v1/models", headers={"Origin": "http://elsewhere"})
        assert "access-control-allow-origin" not in response.headers
    options = ApiOptions(cors_origins=("http://here",), api_keys=("k",))
    with serving(host, tokenizer, options=options) as (url, _):
        asked = {"Origin": "http://here", "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization, x-stainless-lang"
        allowed = httpx2.options(f"{url}/v1/models", headers=asked)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "http://here"


def test_a_full_queue_answers_when_to_come_back(host, tokenizer):
    with serving(host, tokenizer, max_waiting=0) as (url, engine):
        path, body = f"{url}/v1/completions", {"model": "lora", "prompt": ["one"] * 4, "n": 2}
        never = error_of(httpx2.post(path, json=body | {"n": 3}), 400)
        assert "at most 8 completions, got 12" in never["message"]
        running = body | {"stream": True, "max_tokens": 200, "ignore_eos": True}
        with httpx2.stream("POST", path, json=running):
            response = httpx2.post(path, json=body)
        assert error_of(response, 429)["type"] == "rate_limit_error"
        assert response.headers["retry-after"] == "5"
        wait_until(lambda: engine.is_idle)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_not_worked_for(host, tokenizer, stream):
    body = json.dumps(CHAT | {"max_tokens": 200, "ignore_eos": True, "stream": stream}).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with serving(host, tokenizer) as (url, engine):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: engine.gauges()["requests_running"] > 0)
        wait_until(lambda: engine.is_idle)
        assert engine.counts["generated_tokens", "lora"] < 200
        assert engine.gauges()["cache_tokens_used"] == 0


def test_requests_for_more_adapters_than_fit_end_even_when_the_server_stops(host, tokenizer, saved):
    models = ["lazy-lora", "lazy-mixlora"] * 3
    answers = []
    with serving(host, tokenizer, saved, max_adapters=1) as (url, _):

        def ask(model):
            body = CHAT | {"model": model, "max_tokens": 50}
            answers.append(httpx2.post(f"{url}/v1/chat/completions", json=body, timeout=60))

        threads = [threading.Thread(target=ask, args=(model,)) for model in models]

        def num_arrived():
            text = httpx2.get(f"{url}/metrics").text
            states = re.findall(r"^loraloom_requests_(?:running|waiting) ([\d.]+)", text, re.M)
            return sum(map(float, states)) + len(answers)

        for thread in threads:
            thread.start()
        wait_until(lambda: num_arrived() == len(threads))
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * len(models)


def test_addresses_that_can_not_be_used_are_errors():
    with listen("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on 127.0.0.1:{port}"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="can't listen on no such host:0"):
        listen("no such host", 0)


def test_what_fails_in_a_stream_is_told_and_in_the_log(caplog):
    async def objects():
        yield {"text": "so far"}
        raise OSError("of the disk")

    async def events():
        return [event async for event in as_events(objects())]

    assert len(asyncio.run(events())) == 3
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert answer_to(not_finite("logits", "NaN", ["a"])).status_code == 500


@pytest.mark.parametrize("is_allowed", [False, True])
def test_control_tokens_of_messages_are_text_unless_the_server_allows_them(
    host, tokenizer, is_allowed
):
    messages = [{"role": "user", "content": "one <eos> two"}]
    with serving(host, tokenizer, options=ApiOptions(allow_control_tokens=is_allowed)) as (url, _):
        chat = httpx2.post(f"{url}/v1/chat/completions", json=CHAT | {"messages": messages}).json()
        raw = {"model": "lora", "prompt": "one <eos> two", "max_tokens": 1}
        text = httpx2.post(f"{url}/v1/completions", json=raw).json()
    rendered = "user: one <eos> twoassistant:"  # the template ends lines with a block
    trusted = len(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    assert (chat["usage"]["prompt_tokens"] == trusted) == is_allowed
    assert text["usage"]["prompt_tokens"] == len(tokenizer("one <eos> two")["input_ids"])
