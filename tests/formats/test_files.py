import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.config.data import PromptForm
from loraloom.errors import AdapterError, FormatError
from loraloom.formats import describe, raw_files, read_adapter
from loraloom.formats.files import read_stored
from tests.formats.tiny import ATTENTION, FFN, LORA, MIXTURE, llama_base, write


def test_an_adapter_is_not_overwritten_unasked(saved, base, monkeypatch):
    monkeypatch.setenv("HOME", str(saved))
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(AdapterError, match=r"already contains adapter_config.json"):
        write("~", base, seed=1)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_missing_tensors_are_listed(saved, base):
    path = saved / "adapter_model.safetensors"
    save_file(
        {k: v for k, v in load_file(path).items() if "layers.1.self_attn.k_proj" not in k}, path
    )
    with pytest.raises(AdapterError, match=r"missing tensors: layers\.1\.self_attn\.k_proj"):
        read_adapter(saved, base)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name, saved, base):
    (saved / name).unlink()
    with pytest.raises(FormatError, match=f"(has no|contains neither) {name}"):
        read_adapter(saved, base)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "must be JSON"),
        ("adapter_model.safetensors", "is not a safetensors file"),
    ],
)
@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_a_file_cut_short_is_named(name, message, keep, saved, base):
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(FormatError, match=f"{name} {message}"):
        read_adapter(saved, base)


# the last is a number cut short: struct.error
@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x02M\x01"])
def test_a_broken_pickle_is_named(content, saved, base):
    (saved / "adapter_model.safetensors").unlink()
    (saved / "adapter_model.bin").write_bytes(content)
    with pytest.raises(FormatError, match="can't be read as a dict of tensors"):
        read_adapter(saved, base)


class RunsCode:
    def __reduce__(self):
        return print, ("code in a pickle has run",)


def test_code_in_a_pickle_is_not_run(saved, base, capsys):
    (saved / "adapter_model.safetensors").unlink()
    torch.save({"x": RunsCode()}, saved / "adapter_model.bin")
    with pytest.raises(FormatError, match="can't be read as a dict of tensors"):
        read_adapter(saved, base)
    assert capsys.readouterr().out == ""


def test_a_base_model_is_not_an_adapter(tmp_path, base):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FormatError, match="a base model, not an adapter"):
        read_adapter(tmp_path, base)


def test_a_path_that_is_not_there_is_an_error(tmp_path, base):
    for path in (tmp_path / "nowhere", "../owner/nowhere"):
        with pytest.raises(FormatError, match=r"a Hub ID, got .*nowhere"):
            read_adapter(path, base)


def test_a_hub_id_out_of_reach_is_an_error_that_says_both(monkeypatch, base):
    def offline(*args, **kwargs):
        raise OSError("outgoing traffic has been disabled")

    monkeypatch.setattr(raw_files, "snapshot_download", offline)
    with pytest.raises(FormatError, match=r"not a local .*outgoing traffic.*check the name"):
        read_adapter("owner/adapter", base)


def test_another_shape_is_an_error_that_names_the_tensor(saved):
    attention = replace(ATTENTION, shapes={**ATTENTION.shapes, "k_proj": (16, 64)})
    message = (
        r"other \(llama\)\. Load the base model .* trained on, some-org/tiny-llama; .* other "
        r"shapes: layers\.0\.self_attn\.k_proj\.lora_B \(32, 2\), not \(16, 2\)"
    )
    with pytest.raises(AdapterError, match=message):
        read_adapter(saved, llama_base(name_or_path="other", blocks=(attention, FFN)))


def test_other_modules_are_another_base_model(saved, base):
    shapes = {name: ATTENTION.shapes[name] for name in ("q_proj", "k_proj", "v_proj")}
    groups = (("q_proj", "k_proj", "v_proj"), ("dense",))
    attention = replace(ATTENTION, groups=groups, shapes=shapes | {"dense": (64, 64)})
    shapes = {"fc1": (100, 64), "fc2": (64, 100)}
    ffn = replace(FFN, groups=(("fc1",), ("fc2",)), shapes=shapes)
    phi = {"blocks": (attention, ffn), "activation": "gelu_new"}
    with pytest.raises(AdapterError, match="doesn't fit the base model"):
        read_adapter(saved, replace(base, model_type="phi", **phi))


def test_other_weights_of_the_same_shape_are_a_warning(saved, base):
    message = (
        r"trained on some-org/tiny-llama \(.*\), but the base model here is some-org/other \(.*"
        "may be wrong otherwise"
    )
    with pytest.warns(UserWarning, match=message):
        read_adapter(saved, replace(base, name_or_path="some-org/other", fingerprint="v2-another"))


@pytest.mark.parametrize("name", ["some-org/tiny-llama", "/models/Tiny-Llama", ""])
def test_files_without_a_fingerprint_warn_of_a_base_model_of_another_name(base, tmp_path, name):
    write(tmp_path, base)
    weights = tmp_path / "adapter_model.safetensors"
    save_file(load_file(weights), weights)  # as PEFT writes it
    message = "trained on some-org/tiny-llama, but the base model here is some-org/other. Loading"
    with pytest.warns(UserWarning, match=message):
        read_adapter(tmp_path, replace(base, name_or_path="some-org/other"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_adapter(tmp_path, replace(base, name_or_path=name))


@pytest.mark.parametrize("config", [LORA, MIXTURE])
def test_an_adapter_remembers_how_its_training_data_wrote_prompts(tmp_path, base, config):
    form = PromptForm(format="instruction", template="Q: {{ instruction }}\nA: ")
    write(tmp_path, base, config, prompt=form)
    assert read_stored(tmp_path).prompt == form
    assert "## Prompts" in (tmp_path / "README.md").read_text()
    assert describe(tmp_path)["prompt"] == form.model_dump(exclude_none=True)
