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
