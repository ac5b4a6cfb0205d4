"""A server in a thread, and the official client in front of it."""

import openai
import pytest
import torch

from loraloom.serve.http.app import ApiOptions
from tests.conftest import build_tokenizer
from tests.generation.conftest import SIZES
from tests.serve.http.in_process import serving
from tests.tiny import tiny_host

TEMPLATE = (
    "{% for tool in tools or [] %}tool {{ tool['function']['name'] }}\n{% endfor %}"
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for one in message['tool_calls'] %}{{ one['function']['name'] }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


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
