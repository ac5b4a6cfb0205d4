"""Stacks of experts in 4 bits, and those whose weights cannot be read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

import loraloom
from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.errors import AdapterError, ModelError
from loraloom.host.host import Host
from loraloom.host.trial import try_adapters
from tests.base.test_quantized import kept_bytes
from tests.conftest import build_tokenizer
from tests.tiny import randomise, relative_error, stored_weights, tiny_host, tiny_ids, tiny_model

IDS = tiny_ids(5)
CONFIGS = {
    "lora": LoraConfig(rank=3, target_modules=("attention", "experts")),
    "dora": LoraConfig(rank=2, weight_decomposition=True, target_modules="experts"),
    "mixlora": MixLoraConfig(rank=2, num_experts=3, top_k=2, target_modules="experts"),
    "attention": LoraConfig(rank=2, target_modules="attention"),
}
MIXED = [*CONFIGS, None]


def save(directory: Path, family: str, width: int = 64) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": width, "head_dim": 16, "vocab_size": 300}
    if family == "qwen3_moe":
        sizes["moe_intermediate_size"] = width
    tiny_model(family, torch.float32, **sizes).save_pretrained(directory)
    build_tokenizer().save_pretrained(directory)
    return directory


def load(directory: Path, quantization: str | None = None, weights: Host | None = None) -> Host:
    host = loraloom.attach(loraloom.load_base_model(str(directory), quantization=quantization)[0])
    if weights is not None:
        projections = host.add("lora", CONFIGS["lora"]).projections()
        for own, other in zip(projections, weights.adapter("lora").projections(), strict=True):
            own.base.set_weight(other.base.weight)
        host.remove("lora")
    for seed, (name, config) in enumerate(CONFIGS.items()):
        randomise(host.add(name, config, seed=seed), seed)
    return host


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "granitemoe"])
def saved(request, tmp_path_factory) -> Path:
    return save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def host(saved) -> Host:
    return load(saved, "nf4")


@pytest.fixture(scope="module")
def dense(saved, host) -> Host:
    """The same model, of floating-point numbers that were dequantized."""
    return load(saved, weights=host)


def results(host: Host, rows: list[Any]) -> list[Tensor]:
    """Logits, and the gradients of all weights that have one."""
    logits = host(IDS, adapters=rows).logits
    weights = [p for adapter in host.adapters.values() for p in adapter.parameters()]
    gradients = torch.autograd.grad(logits.square().mean(), weights, allow_unused=True)
    return [logits.detach(), *(gradient for gradient in gradients if gradient is not None)]


def test_all_experts_are_quantized(host, dense):
    assert host.base.quantization == "bitsandbytes nf4"
    assert host.base.num_parameters == dense.base.num_parameters
    stored = [tensor.nbytes for name, tensor in stored_weights(host.model) if "experts" in name]
    numbers = [tensor.nbytes for name, tensor in stored_weights(dense.model) if "experts" in name]
    assert sum(stored) < 0.2 * sum(numbers)


def test_forward_and_gradients_are_those_of_the_dequantized_model(host, dense):
    for actual, expected in zip(results(host, MIXED), results(dense, MIXED), strict=True):
        assert relative_error(actual, expected) < 1e-5
    rows = ["attention"] * 5  # the base's own backward pass, which adds up in another order
    for actual, expected in zip(results(host, rows), results(dense, rows), strict=True):
        assert relative_error(actual, expected) < 1e-4


@pytest.mark.parametrize("adapter", ["lora", "attention"])
def test_a_forward_keeps_no_dequantized_weights(host, dense, adapter):
    assert kept_bytes(host, adapter) <= 1.01 * kept_bytes(dense, adapter)


@torch.no_grad()
def test_decoding_and_trials_give_the_logits_of_whole_rows(host):
    whole = host(IDS, adapters=MIXED).logits
    try_adapters(host)
    session = host.prefill(IDS[:, :6], adapters=MIXED)
    host.decode(session, IDS[:, 6])
    assert relative_error(session.logits, whole[:, -1]) < 1e-5


def test_adapters_are_saved_and_exported_but_not_merged(saved, host, tmp_path):
    with pytest.raises(AdapterError, match=r"merging changes .* bitsandbytes nf4.*export"):
        host.merge("lora")
    host.save("dora", tmp_path / "dora")
    load(saved, "nf4").load("again", tmp_path / "dora")  # without a warning of another base
    tokenizer = loraloom.load_base_model(str(saved))[1]
    assert loraloom.export(host, tokenizer, "dora", tmp_path / "out").logit_error < 1e-5
    with pytest.raises(ValueError, match="not serializable"):
        host.model.save_pretrained(tmp_path / "model")


def test_experts_that_cannot_be_quantized_are_named(saved, tmp_path):
    with pytest.warns(UserWarning, match=r"int8 leaves the experts of .* floating point, \d+% of"):
        loraloom.load_base_model(str(saved), quantization="int8")
    with pytest.raises(ModelError, match=r"multiple of 64 .* got 32 in .*experts\.down_proj"):
        load(save(tmp_path, "qwen3_moe", width=32), "nf4")


class Kernel(Mxfp4GptOssExperts):
    """Experts as transformers leaves them after loading, with weights in the kernel's own form."""

    def __init__(self, config: Any, experts: nn.Module):
        super().__init__(config)
        for name in ("gate_up_proj", "down_proj"):
            delattr(self, name)
            setattr(self, name, object())
        self.compute = [experts]

    @torch.no_grad()
    def forward(self, *args: Tensor) -> Tensor:
        return self.compute[0](*args)


def test_adapters_are_next_to_experts_that_only_a_kernel_reads():
    config = LoraConfig(rank=3, target_modules=("attention", "moe"))
    expected = tiny_host("gpt_oss", {"a": config}, torch.float32)
    model = tiny_model("gpt_oss", torch.float32)
    for layer in model.model.layers:
        layer.mlp.experts = Kernel(model.config, layer.mlp.experts)
    host = loraloom.attach(model)
    randomise(host.add("a", config))
    with torch.no_grad():
        rows = ["a", "a", None, None, "a"]
        assert host(IDS, adapters=rows).logits.equal(expected(IDS, adapters=rows).logits)
    for targets in ("experts", ("attention", "experts"), ("experts.down_proj",)):
        with pytest.raises(AdapterError, match=r"got Kernel; set .*\[attention, moe\]"):
            host.add("b", LoraConfig(target_modules=targets))
    with pytest.raises(ModelError, match="training requires gradients through GptOssMLP"):
        host(IDS, adapters=["a"] * 5)
