"""Whole models with adapters against dense weights and plain loops, in float64."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

import loraloom
from loraloom.adapters import LoraConfig, MixLoraConfig
from loraloom.ops.dropout import sample_key
from tests.adapters.plain import IDS, MASK, loss_of
from tests.parity.dense_loop import DenseAdapter, RandomMasks
from tests.tiny import (
    ALL_FAMILIES,
    METHODS,
    changed,
    gradients,
    randomise,
    relative_error,
    tiny_model,
)

KEYS = [sample_key(3, 1, sample) for sample in (5, 6)]
LAYOUTS = ("llama", "phi", "phi3", "gpt_neox")
"""One family for each layout of the FFN: gated, ungated, fused, and ungated under other names."""


def balance_loss(router_logits: list[Tensor], config: MixLoraConfig) -> Tensor:
    """The formula over all layers' real tokens, written out."""
    probability = torch.cat(router_logits).softmax(-1)
    num_chosen = config.experts_per_token or config.num_experts
    ordered = probability.detach().topk(num_chosen)
    chosen = one_hot(ordered.indices, config.num_experts).double()
    if config.routing == "top_p":
        scaled = (torch.cat(router_logits).detach() / config.temperature).softmax(-1)
        if config.compat is not None:
            scaled = probability.detach() / config.temperature
        ordered = scaled.topk(num_chosen).values
        chosen *= (ordered.cumsum(-1) - ordered <= config.top_p).unsqueeze(-1)
    per_slot = [(chosen[:, slot].mean(0) * probability.mean(0)).sum() for slot in range(num_chosen)]
    return config.router_aux_loss_coef * config.num_experts * sum(per_slot)


def compare(family: str, config: LoraConfig, *, train: bool = False, **changes) -> None:
    """Logits at real tokens and the gradients of all weights are equal to 1e-10."""
    plain = tiny_model(family, **changes)
    host = loraloom.attach(copy.deepcopy(plain))
    adapter = randomise(host.add("a", config))
    tensors = {name: t.clone().requires_grad_() for name, t in adapter.tensors().items()}
    masks = RandomMasks(KEYS, MASK) if train else None
    oracle = DenseAdapter(config, host.base, tensors, MASK, masks)
    expected = oracle.attach(plain)(input_ids=IDS, attention_mask=MASK).logits
    host.train(train)
    out = host.hidden(IDS, MASK, ["a", "a"], KEYS if train else None)
    actual = host.logits(out.last_hidden_state)
    real = MASK.bool()
    assert relative_error(actual[real].detach(), expected[real].detach()) < 1e-10
    loss, expected_loss = loss_of(actual), loss_of(expected)
    if isinstance(config, MixLoraConfig):
        loss = loss + config.auxiliary_loss(out.routing["a"])
        expected_loss = expected_loss + balance_loss(oracle.router_logits, config)
    loss.backward()
    expected_loss.backward()
    for name, grad in gradients(adapter).items():
        wanted = tensors[name].grad
        wanted = torch.zeros_like(grad) if wanted is None else wanted
        torch.testing.assert_close(
            grad, wanted, rtol=0, atol=1e-10 * float(wanted.norm() + 1e-3), msg=name
        )


def heavy_balance(config: LoraConfig) -> LoraConfig:
    """Let the load-balance loss weigh as much as the language model's."""
    if not isinstance(config, MixLoraConfig):
        return config
    return changed(config, router_aux_loss_coef=5.0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_logits_and_gradients_are_those_of_a_dense_loop(family, method):
    compare(family, heavy_balance(METHODS[method]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", LAYOUTS)
def test_so_they_are_with_dropout_and_jitter(family, method):
    changes = {"dropout": 0.3}
    if isinstance(METHODS[method], MixLoraConfig):
        changes["router_jitter"] = 0.2
    compare(family, heavy_balance(changed(METHODS[method], **changes)), train=True)


ROUTINGS = {
    "top_p": {"routing": "top_p", "top_p": 0.7},
    "temperature": {"routing": "top_p", "top_p": 0.6, "temperature": 0.7},
    "moe-peft": {"routing": "top_p", "top_p": 0.9, "temperature": 0.7, "compat": "moe-peft"},
    "switch": {"routing": "switch"},
    "dense": {"routing": "dense"},
}


@pytest.mark.parametrize(
    ("routing", "decomposed"), [(name, place % 2 == 0) for place, name in enumerate(ROUTINGS)]
)
def test_any_routing(routing, decomposed):
    """phi's output projection has a bias, which counts as often as the weights sum to."""
    config = MixLoraConfig(
        rank=2, alpha=4, num_experts=4, weight_decomposition=decomposed, **ROUTINGS[routing]
    )
    compare("phi", heavy_balance(changed(config, dropout=0.3)), train=True)
    compare("llama", config)


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ("gate_proj",)),
        ("llama", ("up_proj", "q_proj")),
        ("llama", ("down_proj", "v_proj", "o_proj")),
        ("phi", ("fc1", "k_proj")),
        ("phi", ("fc2", "dense")),
        ("phi3", ("gate_up_proj",)),
        ("phi3", ("down_proj", "qkv_proj")),
    ],
)
def test_any_part_of_the_projections(family, targets, decomposed):
    for config in (
        LoraConfig(rank=2, alpha=4, target_modules=targets, weight_decomposition=decomposed),
        MixLoraConfig(
            rank=2, alpha=4, num_experts=3, target_modules=targets, weight_decomposition=decomposed
        ),
    ):
        compare(family, heavy_balance(config))


@pytest.mark.parametrize("method", METHODS)
def test_rank_stabilized_scaling_and_biases_on_every_projection(method):
    config = changed(METHODS[method], rank_stabilized=True)
    compare("llama", config, attention_bias=True, mlp_bias=True)
