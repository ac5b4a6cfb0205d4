import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import httpx2
import pytest

from loraloom.cli.main import main
from tests.cli.test_chat import saved as _saved

saved = _saved
"""A base model with a tokenizer, and two adapters."""


@pytest.mark.slow
def test_a_server_tells_what_it_serves_and_ends_well_after_sigterm(saved):
    code = "import sys; from loraloom.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", "--port", "0"]
    command += ["--base-model", str(saved / "base"), "--adapter", f"mix={saved / 'mixlora'}"]
    command += ["--cache-tokens", "640", "--max-rows", "5", "--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(4)]
        assert lines[0] == f"models: {saved / 'base'}, mix\n"
        assert lines[1] == "base model: float32 on cpu\n"
        assert lines[2] == "cache: 640 tokens; at most 5 rows of 64 tokens\n"
        address = lines[3].split()[-1].removesuffix("/v1")
        answers = []
        body = {"model": "mix", "prompt": "one", "max_tokens": 50, "ignore_eos": True}
        ask = partial(httpx2.post, f"{address}/v1/completions", json=body, timeout=60)
        thread = threading.Thread(target=lambda: answers.append(ask().json()))
        thread.start()
        metrics = partial(httpx2.get, f"{address}/metrics", timeout=60)
        while "loraloom_requests_running 1.0" not in metrics().text and not answers:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        thread.join()
        assert process.wait(timeout=60) == 0
    assert answers[0]["usage"]["completion_tokens"] == 50


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
        ask = partial(httpx2.post, f"{url}/completions", json=body, headers=headers, timeout=60)
        failures = []

        def ask_in_vain():
            try:
                ask()
            except httpx2.HTTPError as error:
                failures.append(error)

        thread = threading.Thread(target=ask_in_vain)
        thread.start()
        metrics = partial(httpx2.get, f"{url[:-3]}/metrics", headers=headers, timeout=60)
        while "loraloom_requests_running 0.0" in metrics().text:
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 130
        thread.join()
        assert "terminate called" not in process.stderr.read()
    assert len(failures) == 1


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
