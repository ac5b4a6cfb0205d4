import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest

from loraloom.cli.main import main
from loraloom.serve.http.server import listen
from tests.cli.test_chat import saved as _saved

saved = _saved
"""A base model with a tokenizer, and two adapters."""


def test_a_server_tells_what_it_serves_and_ends_well_after_sigterm(saved, monkeypatch, capsys):
    monkeypatch.setattr("loraloom.cli.serve.bound_memory", lambda: None)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setattr(logging.getLogger("loraloom"), "level", logging.INFO)
    with listen("127.0.0.1", 0) as sock:
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
    retrying = httpx2.HTTPTransport(retries=6)  # until the server listens
    client = httpx2.Client(base_url=address, transport=retrying, timeout=60)
    body = {"model": "mix", "prompt": "one", "max_tokens": 50, "ignore_eos": True}

    def stop_while(answer):
        client.get("/health").raise_for_status()
        while "loraloom_requests_running 1.0" not in client.get("/metrics").text:
            if answer.done():
                break
        os.kill(os.getpid(), signal.SIGTERM)

    words = ["--base-model", str(saved / "base"), "--adapter", f"mix={saved / 'mixlora'}"]
    words += ["--cache-tokens", "640", "--max-rows", "5", "--dtype", "float32"]
    with client, ThreadPoolExecutor() as pool:
        answer = pool.submit(client.post, "/v1/completions", json=body)
        stopped = pool.submit(stop_while, answer)
        assert main(["serve", *words, "--port", address.rpartition(":")[2]]) == 0
    stopped.result()
    assert answer.result().json()["usage"]["completion_tokens"] == 50
    assert capsys.readouterr().out.splitlines() == [
        f"models: {saved / 'base'}, mix",
        "base model: float32 on cpu",
        "cache: 640 tokens; at most 5 rows of 64 tokens",
        f"listening on {address}/v1",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "--host 0.0.0.0 is reachable from other machines"),
        (["--api-key-file", "missing"], "the file of API keys can't be read"),
        (["--adapter-dir", "missing"], "adapter_dir "),
        (["--adapter-root", "missing"], "adapter_root "),
        (
            ["--allow-loading", "--no-api-key", "--host", "0.0.0.0"],
            "--allow-loading would let any client replace adapters; pass --admin-key-file",
        ),
        (
            ["--allow-loading", "--no-api-key", "--host", "0.0.0.0", "--engine", "vllm"],
            "--allow-loading would let any client replace adapters; pass --api-key-file",
        ),
        (["--admin-key-file", "k"], "--admin-key-file requires --allow-loading"),
        (["--max-adapters", "2"], "--max-adapters requires --adapter-dir"),
        (["--max-adapter-bytes", "0"], "max_adapter_bytes "),
        (["--max-adapter-bytes", "many"], "max_adapter_bytes "),
        (["--adapter-root", "."], "--adapter-root requires --allow-loading"),
        (["--api-key-file", "k", "--no-api-key"], "--api-key-file and --no-api-key exclude"),
        (["--adapter", "nothing"], "--adapter must be NAME=PATH"),
        (["--allowed-host", "a.example:443"], "allowed_host"),
        (["--allowed-host", "*"], "allowed_host"),
        (["--served-model-name", ""], "served_model_name"),
        (["--served-model-name", "m", "--adapter", "m=x"], "'m' names the base model and an"),
        (["--tool-template", "hermes"], "requires a tokenizer with the tokens <|im_start|>"),
        (["--tool-template", "missing"], "tool_template must be hermes, a Jinja template"),
    ],
)
def test_options_that_can_not_be_heeded_are_errors(saved, capsys, options, message):
    assert main(["serve", "--base-model", str(saved / "base"), "--port", "0", *options]) == 2
    assert message in capsys.readouterr().err


def test_without_the_extra_one_line_says_what_to_install(saved, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("loraloom.serve.http")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--base-model", str(saved / "base")]) == 2
    error = capsys.readouterr().err
    assert "serving requires the package uvicorn" in error
    assert 'pip install "loraloom[serve]"' in error
