"""Each row of the table of families: computing what PEFT and its own blocks do."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loraloom
from loraloom.base.blocks import BaseInfo
from loraloom.base.families import FAMILIES
from tests.blocks import block_of, shapes_of
from tests.parity.peft_models import copy_to_peft, wrapped_by_peft
from tests.tiny import (
    ALL_FAMILIES,
    METHODS,
    changed,
    padded_mask,
    randomise,
    relative_error,
    tiny_ids,
    tiny_model,
)

IDS = tiny_ids(2)
MASK = padded_mask([7, 5])
REAL = MASK.bool()


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ALL_FAMILIES])
def test_a_family_computes_what_peft_and_its_own_blocks_do(family):
    dtype, tolerance = (torch.float64, 1e-9) if is_dense(family) else (torch.float32, 1e-5)
    model = tiny_model(family, dtype)
    host = loraloom.attach(copy.deepcopy(model))
    for name, config in methods_of(family).items():
        adapter = randomise(host.add(name, config))
        theirs = copy.deepcopy(model)
        with torch.no_grad():
            if name == "lora":
                theirs = wrapped_by_peft(theirs, config, host.base)
                copy_to_peft(theirs, host.base, adapter)
            else:
                merge_all(theirs, host.base, config, adapter.tensors())
            expected = theirs(IDS, attention_mask=MASK).logits
            actual = host(IDS, MASK, [name, name]).logits
        assert relative_error(actual[REAL], expected[REAL]) < tolerance, name
        assert set(adapter.tensors()) == config.tensor_shapes(host.base).keys(), name


def is_dense(family: str) -> bool:
    """Whether its FFN blocks are linear layers; mixtures of experts compute in 32 bits at most."""
    return "moe" not in family and family not in ("mixtral", "gpt_oss")


def methods_of(family: str) -> dict[str, Any]:
    """The four methods; on mixtures of experts those without routers, on attention."""
    if is_dense(family):
        return METHODS
    plain = {name: c for name, c in METHODS.items() if not c.experts_per_router}
    return {name: changed(c, target_modules="attention") for name, c in plain.items()}


def merge_all(model: nn.Module, base: BaseInfo, config: Any, tensors: dict[str, Tensor]) -> None:
    """Put updates into a model's weights, and whole FFN blocks in it as experts."""
    for index, layer in enumerate(model.get_submodule(base.layers_path).children()):
        for path in shapes_of(base):
            if f"layers.{index}.{path}.lora_A" in tensors:
                merge(layer.get_submodule(path), config, tensors, f"layers.{index}.{path}")
        if config.experts_per_router:
            ffn = block_of(base, "ffn")
            block = layer.get_submodule(ffn.path)
            experts = [copy.deepcopy(block) for _ in range(config.num_experts)]
            for name in ffn.shapes:
                for number, expert in enumerate(experts):
                    place = f"layers.{index}.{ffn.path}.{name}.experts.{number}"
                    merge(expert.get_submodule(name), config, tensors, place)
            router = tensors[f"layers.{index}.{ffn.path}.router"]
            block.forward = partial(mixed, block.forward, experts, router, config.top_k)


def merge(linear: Any, config: Any, tensors: dict[str, Tensor], place: str) -> None:
    """Put an update into a weight: W + s·BA, or m ∘ (W + s·BA) / ‖W + s·BA‖."""
    linear.weight += config.scaling * tensors[f"{place}.lora_B"] @ tensors[f"{place}.lora_A"]
    if config.weight_decomposition:
        linear.weight *= (tensors[f"{place}.magnitude"] / linear.weight.norm(dim=1)).unsqueeze(1)


def mixed(
    base_forward: Callable[[Tensor], Tensor],
    experts: list[nn.Module],
    router: Tensor,
    top_k: int,
    hidden_states: Tensor,
) -> Tensor:
    """Compute a mixture of blocks at real tokens, and the base's block at padding."""
    weights, chosen = (hidden_states @ router.T).softmax(-1).topk(top_k)
    outputs = torch.stack([expert(hidden_states) for expert in experts], -2)
    picked = outputs.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, outputs.shape[-1]))
    shares = weights / weights.sum(-1, keepdim=True)
    mixture = (shares.unsqueeze(-1) * picked).sum(-2)
    return torch.where(REAL.unsqueeze(-1), mixture, base_forward(hidden_states))
