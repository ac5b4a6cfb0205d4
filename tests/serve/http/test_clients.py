"""Clients of OpenAI's API that others wrote, as far as they are installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loraloom.config.data import PromptForm
from loraloom.serve.http.app import ApiOptions
from tests.conftest import build_tokenizer
from tests.generation.conftest import SIZES
from tests.serve.http.conftest import TEMPLATE
from tests.serve.http.in_process import serving
from tests.tiny import tiny_host

# The clients' Python, which need not be this one.
PYTHON = os.environ.get("LORALOOM_CLIENTS_PYTHON", sys.executable)


@pytest.fixture(scope="module")
def url_and_tokenizer(tmp_path_factory):
    """A base model whose template knows no tools, served with another one for them."""
    directory, tokenizer = tmp_path_factory.mktemp("clients"), build_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(directory)
    host = tiny_host(dtype=torch.float32, **SIZES | {"max_position_embeddings": 512})
    options = ApiOptions(tool_form=PromptForm(format="chat", chat_template=TEMPLATE))
    with serving(host, tokenizer, options=options) as (url, _):
        yield f"{url}/v1", directory


@pytest.mark.slow
@pytest.mark.parametrize(
    "client", ["openai", "litellm", "langchain_openai", "instructor", "lm_eval"]
)
def test_clients_that_others_wrote_are_answered(client, url_and_tokenizer):
    command = [
        PYTHON,
        str(Path(__file__).with_name("clients.py")),
        client,
        *map(str, url_and_tokenizer),
    ]
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    ended = subprocess.run(
        command, env=os.environ | offline, capture_output=True, text=True, timeout=300, check=False
    )
    if ended.returncode == 77:
        pytest.skip(ended.stderr.strip().splitlines()[-1])
    assert ended.returncode == 0, ended.stderr
