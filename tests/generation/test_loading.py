from __future__ import annotations

import pytest

from loraloom.config.model import BaseModelConfig
from loraloom.errors import FormatError, ModelError
from loraloom.generation import loading
from loraloom.generation.loading import check_sources, load_host
from tests.generation.saved import save_tiny
from tests.tiny import tiny_ids


def model(path):
    return BaseModelConfig(base_model=str(path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("saved"))


def test_a_host_has_its_adapters_by_name(saved):
    adapters = {"a": str(saved / "mixlora"), "b": str(saved / "lora")}
    host, tokenizer = load_host(model(saved / "base"), adapters)
    assert list(host.adapters) == ["a", "b"]
    assert len(tokenizer) == host.config.vocab_size
    logits = host(tiny_ids(1).repeat(3, 1), adapters=[None, "a", "b"]).logits
    assert not logits[0].allclose(logits[1])
    assert not logits[1].allclose(logits[2])


def test_sources_are_checked_without_loading_the_base_model(saved, monkeypatch):
    read = []
    monkeypatch.setattr(loading, "load_base_model", lambda *_: pytest.fail("must not load"))
    monkeypatch.setattr(loading, "read_stored", read.append)
    check_sources(model(saved / "base"), {"a": str(saved / "lora")})
    assert read == [saved / "lora"]
    with pytest.raises(ModelError, match=r"\./nowhere"):
        check_sources(model("./nowhere"), {})
    with pytest.raises(FormatError, match="there is no"):
        check_sources(model(saved / "base"), {"a": str(saved / "nowhere")})
