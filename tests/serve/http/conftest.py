"""A server in a thread, and the official client in front of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import openai
import pytest
import torch
import uvicorn

from loraloom.models.host import Host
from loraloom.serve.adapters import AdapterShelf
from loraloom.serve.engine import Engine, EngineLimits
from loraloom.serve.http.app import ApiOptions, create_app
from loraloom.serve.http.server import listen
from tests.conftest import build_tokenizer
from tests.serve.conftest import SIZES
from tests.tiny import tiny_host

BASE = "some/base"
TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool['function']['name'] }}\n{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@contextmanager
def serving(
    host: Host,
    tokenizer: Any,
    directory: Any = None,
    options: ApiOptions | None = None,
    **limits: Any,
) -> Iterator[tuple[str, Engine]]:
    """Serve a host in this process; gives the address, and the engine."""
    settings = {"max_rows": 8, "cache_tokens": 4096, "prefill_tokens": 64}
    engine = Engine(host, tokenizer, EngineLimits(**settings | limits))
    shelf = AdapterShelf(host, BASE, directory, on_removed=engine.forget_prepared)
    app = create_app(engine, tokenizer, shelf, options)
    config = uvicorn.Config(app, log_level="error", ws="none", lifespan="on")
    with listen("127.0.0.1", 0) as sock:
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([sock],))
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", engine
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="package")
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture(scope="package")
def host():
    return tiny_host(dtype=torch.float32, **SIZES | {"max_position_embeddings": 256})


@pytest.fixture(scope="package")
def saved(tmp_path_factory, host):
    """Adapters on disk."""
    directory = tmp_path_factory.mktemp("served")
    for name in ("lora", "mixlora"):
        host.save(name, directory / f"lazy-{name}")
    return directory


@pytest.fixture(scope="package")
def served(host, tokenizer, saved):
    """The address and the engine of a server."""
    with serving(host, tokenizer, saved, ApiOptions(allow_loading=True)) as served:
        yield served


@pytest.fixture
def client(served):
    """The official client."""
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0) as client:
        yield client
