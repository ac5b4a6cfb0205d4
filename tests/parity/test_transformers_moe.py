"""A MixLoRA is a Mixtral whose experts are `W + s·B_e·A_e`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)

import loraloom
from loraloom.adapters import MixLoraConfig
from loraloom.models.host import Host
from tests.tiny import (
    changed,
    gradients,
    padded_mask,
    randomise,
    relative_error,
    router_loss,
    tiny_ids,
    tiny_model,
)

IDS = tiny_ids(3)
MASK = padded_mask([7, 4, 6])
CONFIG = MixLoraConfig(rank=2, alpha=5, num_experts=4, target_modules="ffn")
TOLERANCE = 1e-5  # Mixtral computes its probabilities in float32


def dense_expert(linear: nn.Linear, tensors: dict[str, Tensor], key: str) -> Tensor:
    update = tensors[f"{key}.lora_B"] @ tensors[f"{key}.lora_A"]
    return linear.weight.detach() + CONFIG.expert_config.scaling * update


def fill_moe_block(block: MixtralSparseMoeBlock, host: Host, layer: int) -> None:
    """Give a Mixtral block the router and the experts of an adapter's layer."""
    mlp = host.model.model.layers[layer].mlp
    tensors = host.adapters["a"].tensors()
    prefix = f"layers.{layer}.mlp"
    with torch.no_grad():
        block.gate.weight.copy_(tensors[f"{prefix}.router"])
        for expert in range(CONFIG.num_experts):
            gate, up, down = (
                dense_expert(mlp.get_submodule(name), tensors, f"{prefix}.{name}.experts.{expert}")
                for name in ("gate_proj", "up_proj", "down_proj")
            )
            block.experts.gate_up_proj[expert].copy_(torch.cat([gate, up]))
            block.experts.down_proj[expert].copy_(down)


@pytest.fixture
def host():
    host = loraloom.attach(tiny_model("llama"))
    randomise(host.add("a", CONFIG))
    return host


@pytest.fixture
def mixtral(host):
    """A Mixtral made of the llama's weights and the adapter's experts."""
    keys = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
        "num_key_value_heads max_position_embeddings rms_norm_eps pad_token_id rope_parameters"
    )
    settings = {key: getattr(host.config, key) for key in keys.split()}
    config = MixtralConfig(
        **settings,
        num_local_experts=CONFIG.num_experts,
        num_experts_per_tok=CONFIG.top_k,
        attn_implementation="sdpa",
        experts_implementation="eager",
        sliding_window=None,
    )
    model = MixtralForCausalLM(config).double().eval()
    state = {k: v for k, v in host.model.state_dict().items() if ".mlp.gate_proj" not in k}
    missing, _ = model.load_state_dict(state, strict=False)
    assert all(".mlp." in name for name in missing)
    for index, layer in enumerate(model.model.layers):
        fill_moe_block(layer.mlp, host, index)
    return model


def test_logits_are_those_of_mixtral(host, mixtral):
    with torch.no_grad():
        expected = mixtral(input_ids=IDS, attention_mask=MASK, output_router_logits=True)
        actual = host(IDS, MASK, ["a"] * 3)
    real = MASK.bool()
    assert relative_error(actual.logits[real], expected.logits[real]) < TOLERANCE
    for ours, theirs in zip(actual.routing["a"], expected.router_logits, strict=True):
        theirs = theirs.view(-1, CONFIG.num_experts)[real.flatten()]
        assert relative_error(ours.router_logits, theirs) < TOLERANCE
        probabilities = theirs.softmax(-1).topk(CONFIG.top_k)
        assert torch.equal(ours.selected_experts, probabilities.indices)


def test_the_balance_loss_is_that_of_mixtral_over_real_tokens(host, mixtral):
    with torch.no_grad():
        theirs = mixtral(input_ids=IDS, attention_mask=MASK, output_router_logits=True)
        ours = host(IDS, MASK, ["a"] * 3)
    expected = load_balancing_loss_func(theirs.router_logits, CONFIG.num_experts, 2, MASK)
    config = changed(CONFIG, router_aux_loss_coef=1.0)
    actual = router_loss(ours.routing["a"], config)
    assert float(actual) == pytest.approx(float(expected), rel=1e-6)


def test_gradients_are_those_of_mixtral_by_the_chain_rule(host, mixtral):
    """From the gradient of `W + s·B·A`, that of A is `s·Bᵀ` times it, that of B it times `s·Aᵀ`."""
    mixtral.model(input_ids=IDS).last_hidden_state.tanh().sum().backward()
    host.hidden(IDS, None, ["a"] * 3).last_hidden_state.tanh().sum().backward()
    weights = {name: t.clone() for name, t in host.adapters["a"].tensors().items()}
    grads, scaling = gradients(host.adapters["a"]), CONFIG.expert_config.scaling
    for index, layer in enumerate(mixtral.model.layers):
        router = f"layers.{index}.mlp.router"
        assert relative_error(grads[router], layer.mlp.gate.weight.grad) < TOLERANCE
        gate, up = layer.mlp.experts.gate_up_proj.grad.chunk(2, dim=1)
        down = layer.mlp.experts.down_proj.grad
        for name, dense in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            for expert in range(CONFIG.num_experts):
                key = f"layers.{index}.mlp.{name}.experts.{expert}"
                wanted_A = scaling * weights[f"{key}.lora_B"].T @ dense[expert]
                wanted_B = scaling * dense[expert] @ weights[f"{key}.lora_A"].T
                assert relative_error(grads[f"{key}.lora_A"], wanted_A) < TOLERANCE
                assert relative_error(grads[f"{key}.lora_B"], wanted_B) < TOLERANCE
