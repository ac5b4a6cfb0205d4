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
        lines = [process.stdout.readline() for _ in range(3)]
        assert lines[0] == f"models: {saved / 'base'}, mix\n"
        assert lines[1] == "cache: 640 tokens; at most 5 rows of 64 tokens\n"
        address = lines[2].split()[-1].removesuffix("/v1")
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
