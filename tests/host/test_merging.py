"""An adapter in the base model's weights: its rows are the base's, and the way back is exact."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraloom.adapters import LoraConfig
from loraloom.errors import AdapterError
from tests.tiny import ALL_METHODS, METHODS, relative_error, tiny_host, tiny_ids

IDS = tiny_ids(2, 6)
ATTENTION = r"(self_attn|attention)\.\w+"
MERGEABLE = {
    "lora": METHODS["lora"],
    "rslora": LoraConfig(rank=3, alpha=6, rank_stabilized=True),
    "dora": METHODS["dora"],
    "some": LoraConfig(
        rank=3, layers=(1,), rank_pattern={ATTENTION: 2}, alpha_pattern={ATTENTION: 3}
    ),
    "vera": ALL_METHODS["vera"],
    "moslora": ALL_METHODS["moslora"],
}


def weights(host) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in host.model.state_dict().items()}


def assert_same_bits(actual, expected) -> None:
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@torch.no_grad()
@pytest.mark.parametrize("method", MERGEABLE)
@pytest.mark.parametrize("family", ["llama", "phi", "phi3", "gpt_neox"])
def test_base_rows_are_the_merged_adapters(family, method):
    host = tiny_host(family, {"law": MERGEABLE[method]})
    expected, before = host(IDS, adapters=["law"] * 2).logits, weights(host)
    lost = host.merge("law")
    assert host.merged == "law"
    assert relative_error(host(IDS).logits, expected) < 1e-9
    assert lost < 1e-12
    host.unmerge("law")
    assert host.merged is None
    assert_same_bits(weights(host), before)
    assert torch.equal(host(IDS, adapters=["law"] * 2).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_cost_of_rounding_is_measured_and_undone(dtype):
    host = tiny_host(configs={"law": MERGEABLE["lora"]}, dtype=dtype)
    before = weights(host)
    adapter, base = host.adapters["law"], host.base
    ffn = adapter.base_layers[0].blocks[1]
    exact = adapter.weights_on(ffn)["up_proj"].merged(torch.float64)
    lost = host.merge("law")
    merged = host.model.get_parameter(f"{base.layers_path}.0.mlp.up_proj.weight").double()
    start = before[f"{base.layers_path}.0.mlp.up_proj.weight"].double()
    assert lost == pytest.approx(float((merged - exact).norm() / (exact - start).norm()), rel=0.5)
    host.unmerge("law")
    assert_same_bits(weights(host), before)


def test_what_a_merged_adapter_forbids_is_said():
    host = tiny_host()
    with pytest.raises(AdapterError, match="must be without routers to be merged"):
        host.merge("mixlora")
    host.merge("lora")
    with pytest.raises(AdapterError, match="use None for its rows, or call unmerge"):
        host(IDS, adapters=["lora", None])
    with pytest.raises(AdapterError, match="without a merged adapter to train"):
        host(IDS, adapters=["dora", None], training=True)
    with pytest.raises(AdapterError, match="without a merged adapter to start an adapter"):
        host.add("new", METHODS["lora"])
    with pytest.raises(AdapterError, match="a merged adapter to merge another, it has 'lora'"):
        host.merge("dora")
    with pytest.raises(AdapterError, match="without a merged adapter to remove it"):
        host.remove("lora")
    with pytest.raises(AdapterError, match="the adapter to unmerge must be lora, got 'dora'"):
        host.unmerge("dora")


@torch.no_grad()
def test_detaching_gives_the_untouched_model_back():
    host = tiny_host(configs={"law": METHODS["lora"]})
    before = weights(host)
    host.merge("law")
    assert_same_bits(host.detach().state_dict(), before)


def test_what_depends_on_the_bases_weights_is_not_loaded_beside_a_merged_adapter(tmp_path):
    host = tiny_host(configs={"law": METHODS["lora"], "dora": METHODS["dora"]})
    host.save("dora", tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    kept = {name: t for name, t in load_file(weights).items() if "magnitude" not in name}
    save_file(kept, weights, metadata={"format": "pt"})  # as MoE-PEFT saves a DoRA
    host.merge("law")
    with (
        pytest.warns(UserWarning, match="a DoRA without magnitudes"),
        pytest.raises(AdapterError, match="to load what depends on its weights, it has 'law'"),
    ):
        host.load("other", tmp_path)
