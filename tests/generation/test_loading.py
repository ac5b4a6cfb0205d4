import pytest

from loraloom.config.model import BaseModelConfig
from loraloom.errors import ConfigError
from loraloom.generation import loading
from loraloom.generation.loading import load_host
from tests.generation.saved import save_tiny


def model(path):
    return BaseModelConfig(base_model=str(path), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("saved"))


def test_a_containers_limit_bounds_the_memory(tmp_path, monkeypatch):
    group = tmp_path / "pods" / "one"
    group.mkdir(parents=True)
    for directory, limit in ((group, "max"), (group.parent, "5000")):
        for name, text in (("max", limit), ("current", "3000"), ("stat", "x 1\ninactive_file 700")):
            (directory / f"memory.{name}").write_text(f"{text}\n")
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/pods/one\n")
    unbound = loading.available_memory()
    monkeypatch.setattr(loading, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(loading, "_OWN_GROUP", tmp_path / "own")
    assert loading.available_memory() == 2700 < unbound


def test_a_cache_without_room_for_its_rows_is_an_error(saved, monkeypatch):
    host, _ = load_host(model(saved / "base"), {})
    assert loading.default_cache_tokens(host, 2) == 2 * host.config.max_position_embeddings
    monkeypatch.setattr(loading, "available_memory", lambda: 10**6)
    with pytest.raises(ConfigError, match="too small for the cache"):
        loading.default_cache_tokens(host, 64)
