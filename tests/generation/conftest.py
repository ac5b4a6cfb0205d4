"""Hosts and engines that the tests of serving share."""

from typing import Any

import pytest
import torch

from loraloom.generation.engine import Engine
from loraloom.generation.scheduler import EngineLimits
from tests.tiny import ALL_METHODS, tiny_host

SIZES = {"vocab_size": 300, "max_position_embeddings": 128, "eos_token_id": 2}
NAMES = [None, *ALL_METHODS]


@pytest.fixture(scope="module")
def host():
    """Every method on one base model, in the precision that is served."""
    return tiny_host(configs=ALL_METHODS, dtype=torch.float32, **SIZES)


@pytest.fixture
def make_engine(host, tiny_tokenizer):
    def make(**limits: Any) -> Engine:
        settings = {"max_rows": 8, "cache_tokens": 1024, "prefill_tokens": 16}
        return Engine(host, tiny_tokenizer, EngineLimits(**settings | limits))

    return make
