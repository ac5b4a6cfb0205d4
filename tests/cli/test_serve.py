import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

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


@pytest.mark.slow
def test_sighup_changes_the_keys_and_a_second_signal_ends_a_busy_server_at_once(saved, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("old")
    code = "import sys; from loraloom.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "--port", "0", "--api-key-file", str(keys)]
    command += ["--base-model", str(saved / "base")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ, **pipes) as process:
        lines = [process.stdout.readline() for _ in range(4)]
        url = lines[3].split()[-1]

        def status(key):
            headers = {"Authorization": f"Bearer {key}"}
            return httpx2.get(f"{url}/models", headers=headers, timeout=60).status_code

        assert [status("old"), status("new")] == [200, 401]
        keys.write_text("new")
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + 60
        while status("new") != 200 and time.monotonic() < end:
            time.sleep(0.02)
        assert [status("old"), status("new")] == [401, 200]
        body = {"model": str(saved / "base"), "prompt": ["one"] * 280, "max_tokens": 50}
        body["ignore_eos"] = True
        headers = {"Authorization": "Bearer new"}
        pool = ThreadPoolExecutor()
        ask = partial(httpx2.post, f"{url}/completions", json=body, headers=headers, timeout=60)
        answer = pool.submit(ask)
        metrics = partial(httpx2.get, f"{url[:-3]}/metrics", headers=headers, timeout=60)
        while "loraloom_requests_running 0.0" in metrics().text:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 130
        assert isinstance(answer.exception(), httpx2.HTTPError)
        assert "terminate called" not in process.stderr.read()


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
        (["--shared-prompt-cache"], "--shared-prompt-cache requires API keys"),
        (["--adapter-root", "."], "--adapter-root requires --allow-loading"),
        (["--api-key-file", "k", "--no-api-key"], "--api-key-file and --no-api-key exclude"),
        (["--adapter", "nothing"], "--adapter must be NAME=PATH"),
        (["--allowed-host", "a.example:443"], "allowed_host"),
        (["--allowed-host", "*"], "allowed_host"),
        (["--served-model-name", ""], "served_model_name"),
        (["--served-model-name", "m", "--adapter", "m=x"], "'m' names the base model and an"),
        (["--tool-template", "hermes"], "requires a tokenizer with the tokens <|im_start|>"),
        (["--tool-template", "missing"], "tool_template must be trl, hermes, a Jinja template"),
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
