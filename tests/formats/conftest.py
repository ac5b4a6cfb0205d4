import os
from pathlib import Path

import pytest

from loraloom.base.blocks import BaseInfo
from tests.formats.tiny import LORA, MIXTURE, llama_base, write


@pytest.fixture
def base() -> BaseInfo:
    return llama_base()


@pytest.fixture(params=[LORA, MIXTURE], ids=["lora", "mixlora"])
def saved(request, base, tmp_path):
    write(tmp_path / "a", base, request.param)
    return tmp_path / "a"


@pytest.fixture
def shared_fixtures() -> Path:
    """Checkpoints that MoE-PEFT itself has written."""
    root = Path(os.environ.get("LORALOOM_SHARED", "../shared")) / "fixtures"
    if not root.is_dir():
        pytest.skip(f"no fixtures at {root}; set LORALOOM_SHARED")
    return root
