from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.saved import save_inputs


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Let nothing depend on how many threads share a sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return save_inputs(tmp_path_factory.mktemp("inputs"))
