"""Methods the slow way: each projection of a plain transformers model computes a paper's formula.

Axes: B batch, L sequence, I in_features, O out_features.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import loraloom
from loraloom.adapters.contract import Adapter, AdapterConfig
from loraloom.adapters.segment import SegmentTokens
from tests.blocks import shapes_of
from tests.tiny import (
    gradients,
    padded_mask,
    randomise,
    relative_error,
    tiny_host,
    tiny_ids,
    tiny_model,
)

Update = Callable[[Tensor, dict[str, Tensor], str], Tensor]
"""From a projection's input [B, L, I], its tensors by part and its key to the update [B, L, O]."""

IDS = tiny_ids(2, 6)
MASK = padded_mask([6, 4], length=6)


def compare(
    config: AdapterConfig,
    update: Update,
    family: str,
    added_loss: Callable[[], Tensor] | None = None,
) -> None:
    """Check that logits at real tokens and the gradients of all weights are the formula's.

    Args:
        config: The adapter's.
        update: The formula, without loraloom's arithmetic.
        family: Of the base model.
        added_loss: The method's own loss of the pass that was made last.
    """
    plain = tiny_model(family)
    host = loraloom.attach(copy.deepcopy(plain))
    adapter = randomise(host.add("a", config))
    tensors = {name: t.clone().requires_grad_() for name, t in adapter.tensors().items()}
    for layer in range(host.base.num_layers):
        for path in shapes_of(host.base):
            module = plain.get_submodule(f"{host.base.layers_path}.{layer}.{path}")
            replace_forward(module, f"layers.{layer}.{path}", tensors, update)
    expected = plain(input_ids=IDS, attention_mask=MASK).logits
    out = host(IDS, MASK, ["a", "a"])
    real = MASK.bool()
    assert relative_error(out.logits[real].detach(), expected[real].detach()) < 1e-10
    loss, expected_loss = loss_of(out.logits), loss_of(expected)
    if added_loss is not None:
        loss = loss + adapter.config.auxiliary_loss(out.routing["a"])
        expected_loss = expected_loss + added_loss()
    loss.backward()
    expected_loss.backward()
    grads = gradients(adapter)
    for name, grad in grads.items():
        error = relative_error(grad, tensors[name].grad)
        assert error < 1e-9, (name, error)
    idle = [name for name, grad in grads.items() if not grad.any()]
    assert all("experts" in name for name in idle)  # no token chose the expert


def replace_forward(
    module: torch.nn.Module, key: str, tensors: dict[str, Tensor], update: Update
) -> None:
    """Let a linear layer add the update that belongs to its key."""
    own = {
        name.removeprefix(f"{key}."): tensor
        for name, tensor in tensors.items()
        if name.startswith(f"{key}.")
    }
    module.forward = lambda x: linear(x, module.weight, module.bias) + update(x, own, key)


def sum_experts(x: Tensor, own: dict[str, Tensor], weights: Tensor) -> Tensor:
    """Add up a projection's LoRA experts, one by one, with each token's weights."""
    total = torch.zeros(())
    for expert, weight in enumerate(weights.unbind(-1)):
        A, B = own[f"experts.{expert}.lora_A"], own[f"experts.{expert}.lora_B"]
        total = total + weight.unsqueeze(-1) * (x @ A.T @ B.T)
    return total


def top_k_softmax(logits: Tensor, top_k: int) -> Tensor:
    """Compute probabilities of which the largest are left, renormalised."""
    chosen = torch.zeros_like(logits).scatter(-1, logits.topk(top_k).indices, 1)
    weights = logits.softmax(-1) * chosen
    return weights / weights.sum(-1, keepdim=True)


def loss_of(logits: Tensor) -> Tensor:
    """Compute the language model's loss of the real tokens, summed."""
    real = MASK[:, 1:].bool()
    return cross_entropy(logits[:, :-1][real], IDS[:, 1:][real], reduction="sum")


def check_ffn_gradients(config: AdapterConfig) -> None:
    """Check the derivatives of a small FFN block by finite differences."""
    sizes = {"hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1}
    host = tiny_host(configs={"a": config}, **sizes)
    adapter, mlp = host.adapters["a"], host.model.model.layers[0].mlp
    block = adapter.layers[0]["mlp"]

    def ffn(hidden_states: Tensor, *parameters: Tensor) -> Tensor:
        return ffn_output(adapter, mlp, hidden_states)

    states = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inputs = (states.requires_grad_(), *block.parameters())
    assert torch.autograd.gradcheck(ffn, inputs, fast_mode=True)


def ffn_output(adapter: Adapter, mlp: torch.nn.Module, hidden_states: Tensor) -> Tensor:
    """Run an adapted FFN block of the first layer."""
    block = adapter.base_layers[0].blocks[1]
    outputs = [mlp.gate_proj(hidden_states), mlp.up_proj(hidden_states)]
    weights = adapter.ffn_weights(block, hidden_states.dtype)
    rows = adapter.ffn(block, weights, hidden_states, outputs, SegmentTokens(0))
    return rows.finish(mlp.down_proj(rows.hidden))
