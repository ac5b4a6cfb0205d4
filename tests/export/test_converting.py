"""Adapters' files in other programs' forms: what is written, and what is refused."""

import json

import pytest
import torch
from peft import PeftModel

from loraloom.adapters import (
    DynMoleConfig,
    LoraConfig,
    LoraMoeConfig,
    MixLoraConfig,
    MolaConfig,
    RoutedConfig,
)
from loraloom.cli.main import main
from loraloom.errors import AdapterError
from loraloom.exports.converting import convert
from tests.formats.tiny import edit_config, name_base
from tests.tiny import ALL_METHODS, METHODS, changed, relative_error, tiny_host, tiny_ids

IDS = tiny_ids(2)


@torch.no_grad()
def logits(host, name: str):
    return host(IDS, adapters=[name] * 2).logits


def saved(tmp_path, config, family: str = "llama"):
    """A host with an adapter, and the directory that it is saved in."""
    host = tiny_host(family, {"a": config}, torch.float32)
    host.save("a", tmp_path / "saved")
    name_base(tmp_path / "saved", host)
    return host, tmp_path / "saved"


def test_any_method_is_converted_without_weights_of_the_base_model(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    host, source = saved(tmp_path, ALL_METHODS["vera"])
    convert(source, "~/native", "native")
    host.load("b", tmp_path / "native")
    assert torch.equal(logits(host, "b"), logits(host, "a"))


def test_a_base_model_that_is_not_there_must_be_passed(tmp_path):
    _, source = saved(tmp_path, METHODS["lora"])
    edit_config(source, base_model_name_or_path=str(tmp_path / "moved"))
    with pytest.raises(AdapterError, match=r"requires its base model's .*; pass --base-model"):
        convert(source, tmp_path / "native", "native")


def test_a_router_by_prompt_is_converted(tmp_path):
    host, _ = saved(tmp_path, METHODS["lora"])
    host.add("auto", RoutedConfig(experts={"a": "a", "b": "a"}))
    host.save("auto", tmp_path / "auto")
    name_base(tmp_path / "auto", host)
    convert(tmp_path / "auto", tmp_path / "native", "native", settings={"temperature": 2.0})
    assert host.load("c", tmp_path / "native").config.temperature == 2


FOR_THE_REFERENCE = {
    "lora": METHODS["lora"],
    "rslora": LoraConfig(rank=4, alpha=6, rank_stabilized=True, target_modules="attention"),
    "mixlora": changed(METHODS["mixlora"], experts={"rank": 3, "alpha": 5, "dropout": 0.0}),
    "dynamic": changed(METHODS["mixlora"], routing="top_p", top_p=0.6),
    "switch": changed(METHODS["mixlora"], routing="switch", compat="moe-peft"),
    "temperature": changed(METHODS["mixlora"], routing="top_p", temperature=2, compat="moe-peft"),
    "dense": changed(METHODS["mixlora"], routing="dense"),
    "mola": MolaConfig(rank=2, alpha=4, num_experts=3),
    "loramoe": LoraMoeConfig(rank=2, alpha=4, num_experts=3, dropout=0.1),
}


@pytest.mark.parametrize("case", FOR_THE_REFERENCE)
def test_the_reference_gets_a_pickle_and_the_fields_that_it_reads(case, tmp_path):
    host, source = saved(tmp_path, FOR_THE_REFERENCE[case])
    convert(source, tmp_path / "theirs", "reference")
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.bin", "README.md"}
    tensors = torch.load(tmp_path / "theirs" / "adapter_model.bin", weights_only=True)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    fields = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert isinstance(fields["lora_alpha"], int)
    assert fields["lora_dropout"] > 0
    assert (fields.get("expert_lora") or {}).get("lora_dropout", 1) > 0
    host.load("b", tmp_path / "theirs")
    assert relative_error(logits(host, "b"), logits(host, "a")) < 1e-6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (METHODS["dora"], "support DoRA with weight_decomposition: True"),
        (METHODS["mixdora"], "support MixDoRA with weight_decomposition: True"),
        (LoraConfig(rank=4, alpha=2.5), r"support LoRA with alpha: 2.5"),
        (MixLoraConfig(num_experts=2, routing="top_p", temperature=2), "temperature: 2.0; --set"),
        (MixLoraConfig(num_experts=2, routing="switch"), "routing: 'switch'; --set compat=moe"),
        (ALL_METHODS["mola"], r"num_experts: \(3, 4\)"),
        (MolaConfig(num_experts=3, routing="dense"), "support MoLA with routing: 'dense'"),
        (DynMoleConfig(num_experts=3), "MoE-PEFT does not support DynMoLE"),
    ],
)
def test_the_reference_is_not_given_what_it_lacks(config, message, tmp_path):
    _, source = saved(tmp_path, config)
    with pytest.raises(AdapterError, match=message):
        convert(source, tmp_path / "theirs", "reference")
    assert not (tmp_path / "theirs").exists()


def test_peft_is_not_given_a_mixture(tmp_path):
    _, source = saved(tmp_path, METHODS["mixlora"])
    with pytest.raises(
        AdapterError, match=r"PEFT does not support MixLoRA; `import loraloom.peft`"
    ):
        convert(source, tmp_path / "theirs", "peft")


# PEFT compares its patterns with modules, and not with parameters.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_peft_reads_a_lora_on_experts_that_was_trained_with_dropout(tmp_path):
    config = LoraConfig(rank=2, dropout=0.1, target_modules="experts", base_experts=(0, 2))
    host, source = saved(tmp_path, config, "qwen3_moe")
    convert(source, tmp_path / "theirs", "peft")
    expected = logits(host, "a")
    theirs = PeftModel.from_pretrained(host.detach(), tmp_path / "theirs")
    assert relative_error(theirs(IDS).logits, expected) < 1e-5


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("experts", "on experts of qwen3_moe, does not load DoRA; write"),
        ("moe", "updates next to a block"),
    ],
)
def test_peft_is_not_given_what_it_lacks_in_moe_bases(target, message, tmp_path):
    config = LoraConfig(rank=2, weight_decomposition=target == "experts", target_modules=target)
    _, source = saved(tmp_path, config, "qwen3_moe")
    with pytest.raises(AdapterError, match=message):
        convert(source, tmp_path / "theirs", "peft")


def test_the_base_model_gives_lost_magnitudes_and_checks_the_fit(tmp_path):
    host, source = saved(tmp_path, changed(METHODS["lora"], weight_decomposition=False))
    edit_config(source, use_dora=True)
    with (
        pytest.warns(UserWarning, match="a DoRA without magnitudes"),
        pytest.raises(AdapterError, match=r"contains no magnitudes.*--base-model"),
    ):
        convert(source, tmp_path / "native", "native")
    with pytest.warns(UserWarning, match="a DoRA without magnitudes"):
        config = convert(source, tmp_path / "native", "native", host=host)
    assert (config.title, list(host.adapters)) == ("DoRA", ["a"])
    adapter = host.load("b", tmp_path / "native")
    base = host.model.model.layers[1].mlp.up_proj.weight
    magnitude = adapter.tensors()["layers.1.mlp.up_proj.magnitude"]
    torch.testing.assert_close(magnitude, base.norm(dim=1))


def test_the_command_converts_with_other_settings(tmp_path, capsys):
    host, source = saved(tmp_path, METHODS["mixlora"])
    new = tmp_path / "new"
    assert main(["convert", str(source), str(new), "--to", "native", "--set", "top_k=1"]) == 0
    assert "MixLoRA, rank 2, for native" in capsys.readouterr().out
    assert host.load("b", new).config.top_k == 1
    assert main(["convert", str(source), str(new), "--to", "native"]) == 2
    assert "already exists; convert to a new directory" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "x"), "--to", "peft"]) == 2
