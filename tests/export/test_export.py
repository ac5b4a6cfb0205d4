"""Exports are loaded by others, transformers' own classes and gguf's reader, and give the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import loraloom
from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.config.data import PromptForm
from loraloom.errors import AdapterError, ConfigError
from loraloom.exports import model as exporting
from loraloom.exports.model import TWINS
from loraloom.host.host import Host
from tests.conftest import build_tokenizer
from tests.tiny import ALL_METHODS, METHODS, changed, relative_error, tiny_host, tiny_ids

IDS = tiny_ids(2, 12)
EXPORTED = {
    "mixlora": METHODS["mixlora"],
    "mixdora": METHODS["mixdora"],
    "down": MixLoraConfig(rank=2, num_experts=3, top_k=1, target_modules=("down_proj",)),
}


def host_of(family: str, configs=METHODS, **changes) -> Host:
    return tiny_host(family, configs, torch.float32, **{"max_position_embeddings": 256} | changes)


def exported(host: Host, name: str, path: Path, **options) -> loraloom.Export:
    return loraloom.export(host, build_tokenizer(), name, path, **options)


def load(path: Path) -> PreTrainedModel:
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "method"),
    [*((family, "mixlora") for family in TWINS), ("qwen3", "mixdora"), ("llama", "down")],
)
def test_an_moe_checkpoint_computes_what_the_mixture_does(tmp_path, family, method):
    host = host_of(family, {"a": EXPORTED[method]})
    done = exported(host, "a", tmp_path / "out")
    loaded = load(done.path)
    assert type(loaded).__name__ == done.architecture != type(host.model).__name__
    assert relative_error(loaded(IDS).logits, host(IDS, adapters=["a", "a"]).logits) < 1e-4
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    ours = host.generate(IDS, torch.ones_like(IDS), ["a", "a"], **options)
    assert loaded.generate(IDS, attention_mask=torch.ones_like(IDS), **options).equal(ours)
    assert done.logit_error is not None
    assert done.logit_error < 1e-5


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "method"),
    [
        *(("llama", method) for method in ("lora", "dora", "vera", "moslora")),
        *((family, "dora") for family in ("phi", "phi3", "gpt_neox", "gemma2")),
    ],
)
def test_a_merged_model_computes_what_the_adapter_does(tmp_path, family, method):
    host = host_of(family, {"a": ALL_METHODS[method]})
    loaded = load(exported(host, "a", tmp_path / "out").path)
    assert type(loaded) is type(host.model)
    assert relative_error(loaded(IDS).logits, host(IDS, adapters=["a", "a"]).logits) < 1e-4


@torch.no_grad()
def test_sums_and_experts_are_exported_as_plain_adapters_are(tmp_path):
    host = host_of("llama", {name: ALL_METHODS[name] for name in ("lora", "dora", "vera")})
    host.add("auto", loraloom.RoutedConfig(experts={"law": "lora", "math": "vera"}))
    for number, name in enumerate(["lora:0.5+dora", "auto/math"]):
        loaded = load(exported(host, name, tmp_path / str(number)).path)
        assert relative_error(loaded(IDS).logits, host(IDS, adapters=[name, name]).logits) < 1e-4
    with pytest.raises(AdapterError, match="from Python, export one of its experts, auto/law"):
        exported(host, "auto", tmp_path / "auto", to="moe")


@torch.no_grad()
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_a_merged_mixture_of_experts_has_its_checkpoints_names(tmp_path, family):
    host = host_of(family, {"a": LoraConfig(rank=2, target_modules=("attention", "experts"))})
    done = exported(host, "a", tmp_path / "out")
    host.model.save_pretrained(tmp_path / "theirs")
    ours = load_file(done.path / "model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert done.num_bytes == sum(tensor.nbytes for tensor in theirs.values())
    assert relative_error(load(done.path)(IDS).logits, host(IDS, adapters=["a", "a"]).logits) < 1e-4


def test_a_checkpoint_has_what_from_pretrained_and_servers_read(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "MAX_FILE_BYTES", 1)  # less than any tensor
    host = host_of("llama", tie_word_embeddings=True)
    done = exported(host, "mixlora", tmp_path / "out", dtype="bfloat16")
    names = {path.name for path in done.path.iterdir()}
    assert len({path.stat().st_mode for path in done.path.iterdir()}) == 1  # all may read them
    assert {"config.json", "generation_config.json", "tokenizer.json"} < names
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {n for n in names if n.endswith(".safetensors")}
    assert len(set(index["weight_map"].values())) > 1
    assert "lm_head.weight" not in index["weight_map"]
    assert index["metadata"]["total_size"] == done.num_bytes
    config = json.loads((done.path / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (4, 2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lora", "mixlora"])
def test_files_hold_as_many_tensors_as_fit(tmp_path, monkeypatch, name):
    host = host_of("llama", num_hidden_layers=5)
    rows = [name, name]
    done = exported(host, name, tmp_path / "one")
    assert [path.name for path in done.path.glob("*model*")] == ["model.safetensors"]
    monkeypatch.setattr(exporting, "MAX_FILE_BYTES", done.num_bytes // 2)
    several = exported(host, name, tmp_path / "several")
    files = {path: path.stat().st_size for path in several.path.glob("*.safetensors")}
    assert 2 <= len(files) <= 4
    assert sum(files.values()) >= several.num_bytes == done.num_bytes
    for path in (done.path, several.path):
        assert relative_error(load(path)(IDS).logits, host(IDS, adapters=rows).logits) < 1e-4


def test_of_several_chat_templates_the_default_becomes_the_adapters():
    adapter, tokenizer = host_of("llama").adapter("lora"), build_tokenizer()
    adapter.prompt = PromptForm(format="chat", system="Be kind.")
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "rag": "no"}
    writer: Any = exporting._with_prompts_of(adapter, tokenizer)
    text = writer.apply_chat_template([{"role": "user", "content": "one"}], tokenize=False)
    assert (text, writer.chat_template["rag"]) == ("Be kind.", "no")


@torch.no_grad()
def test_sixteen_bits_cost_what_the_export_says(tmp_path):
    host, rows, errors = host_of("llama"), ["mixlora"], {}
    ids = torch.randint(host.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
    for dtype in ("bfloat16", "float16"):
        done = exported(host, "mixlora", tmp_path / dtype, dtype=dtype)
        errors[dtype] = done.logit_error
        measured = relative_error(load(done.path)(ids).logits, host(ids, adapters=rows).logits)
        assert measured == pytest.approx(done.logit_error, rel=1e-2)
    assert 1e-3 < errors["bfloat16"] < 5e-2
    assert errors["float16"] < errors["bfloat16"] / 3


@pytest.mark.parametrize(
    ("family", "name", "to", "changes", "message"),
    [
        ("gemma2", "mixlora", None, {}, r"of a family .*\(llama, .* got gemma2"),
        ("llama", "lora", "moe", {}, "mixture whose routers choose top_k whole FFN experts .*LoRA"),
        ("llama", "mixlora", "merged", {}, "must be without routers to be merged"),
        ("llama", "mixlora", None, {"attention_bias": True}, "can't be a Mixtral.*q_proj.bias"),
    ],
)
def test_what_no_class_computes_is_refused_with_the_reason(
    tmp_path, family, name, to, changes, message
):
    with pytest.raises(AdapterError, match=message):
        exported(host_of(family, **changes), name, tmp_path / "out", to=to)
    assert list(tmp_path.iterdir()) == []


def test_files_that_compute_something_else_are_an_error_and_go(tmp_path, monkeypatch):
    host = host_of("llama")
    twin = TWINS["llama"]
    swapped = {"llama": type(twin)(**vars(twin) | {"settings": {"rms_norm_eps": 0.5}})}
    monkeypatch.setattr(exporting, "TWINS", swapped)
    with pytest.raises(AdapterError, match=r"logits must be the adapter's within 0\.0001"):
        exported(host, "mixlora", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_trains_is_exported_without_its_dropout(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    host = host_of("llama", {"a": changed(METHODS["lora"], dropout=0.5)}).train()
    result = exported(host, "a", Path("~/out"))
    assert result.logit_error < 1e-5
    assert result.path == tmp_path / "out"


@pytest.mark.parametrize(
    ("path", "to", "message"),
    [
        ("there", None, "must be a new path"),
        ("here", None, "neither the current one"),
        ("file", None, "must be a new path"),
        ("adapter.gguf", None, "a directory"),
        ("adapter", "gguf", "a file"),
    ],
)
def test_an_output_that_cannot_be_used_is_refused(tmp_path, monkeypatch, path, to, message):
    (tmp_path / "there" / "kept").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=message):
        exported(host_of("llama"), "lora", tmp_path / path, to=to)
    assert (tmp_path / "there" / "kept").is_dir()


def gguf_of(host: Host, name: str, path: Path, **options) -> GGUFReader:
    done = exported(host, name, path / "adapter.gguf", to="gguf", **options)
    assert done.num_bytes == done.path.stat().st_size
    return GGUFReader(done.path)


def values(reader: GGUFReader, name: str) -> np.ndarray:
    (found,) = [tensor.data for tensor in reader.tensors if tensor.name == name]
    return np.asarray(found)


@pytest.mark.parametrize("stabilized", [False, True])
def test_a_gguf_adapter_has_llama_cpps_names_and_alpha(tmp_path, stabilized):
    host = host_of("qwen2", {"a": LoraConfig(rank=4, alpha=6, rank_stabilized=stabilized)})
    reader = gguf_of(host, "a", tmp_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    names = ("general.architecture", "general.type", "adapter.type")
    assert [fields[name] for name in names] == ["qwen2", "adapter", "lora"]
    assert fields["adapter.lora.alpha"] == (12 if stabilized else 6)  # llama.cpp divides by rank
    ours = host.adapters["a"].tensors()
    pairs = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj"}
    pairs |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    for theirs, path in pairs.items():
        for part in "ab":
            expected = ours[f"layers.1.{path}.lora_{part.upper()}"].numpy()
            stored = values(reader, f"blk.1.{theirs}.weight.lora_{part}")
            np.testing.assert_allclose(stored, expected, rtol=1e-6)
    assert len(reader.tensors) == len(ours)


def test_rows_that_llama_cpp_rotates_in_pairs_are_put_in_pairs(tmp_path):
    host = host_of("llama", {"a": LoraConfig(rank=4, alpha=4)})
    reader = gguf_of(host, "a", tmp_path)
    heads, size = host.config.num_key_value_heads, host.config.head_dim
    expected = host.adapters["a"].tensors()["layers.0.self_attn.k_proj.lora_B"]
    stored = values(reader, "blk.0.attn_k.weight.lora_b")
    for head in range(heads):
        for row in range(size // 2):
            for half in range(2):
                theirs = stored[head * size + 2 * row + half]
                ours = expected[head * size + half * (size // 2) + row]
                np.testing.assert_allclose(theirs, ours.numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", ["dora", "mixlora"])
def test_what_llama_cpp_has_no_adapter_for_is_refused(tmp_path, name):
    with pytest.raises(AdapterError, match="to be a GGUF adapter"):
        exported(host_of("llama"), name, tmp_path / "a.gguf", to="gguf")
    assert list(tmp_path.iterdir()) == []
