"""One FFN layer, forward and backward, and the activations that it keeps for the backward pass.

Axes: T tokens, D hidden, F feed-forward.

Cases: `frozen` is the base's FFN with a gradient to its input only; `peft-lora` is PEFT's LoRA on
its three projections (plain autograd, float32 adapters); the others are loraloom's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from loraloom.adapters.adapter import BaseLayer, FfnShape
from loraloom.adapters.low_rank import BaseProjection
from loraloom.bench.step import StepSetting, adapter_config, fill_B
from loraloom.models.host import METHODS
from loraloom.models.layout import make_layout
from loraloom.models.running import RunningForward, RunningSlot
from loraloom.models.wrappers import FfnBlock

_SHAPE = FfnShape(("gate_proj", "up_proj"), "down_proj")


@dataclass(frozen=True)
class LayerSetting:
    """Sizes of the layer: D, F, T, the rank, and the mixture's experts."""

    hidden_size: int = 576
    ffn_size: int = 1536
    num_tokens: int = 2048
    rank: int = 8
    num_experts: int = 8
    top_k: int = 2
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class LayerCase:
    """A layer ready to run.

    Args:
        run: One forward and backward.
        saved_bytes: Activations kept between the two: unique storages, weights left out.
    """

    run: Callable[[], None]
    saved_bytes: int


def make_layer(case: str, setting: LayerSetting) -> LayerCase:
    """Build a layer of a case with random weights.

    Args:
        case: `frozen`, `peft-lora`, `lora`, `dora`, `mixlora` or `mixdora`.
        setting: Sizes.
    """
    generator = torch.Generator().manual_seed(0)
    mlp = _base_mlp(setting, generator)
    shape = (1, setting.num_tokens, setting.hidden_size)
    hidden_states = torch.randn(shape, generator=generator).to(setting.dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(setting.dtype)
    forward, weights = _forward_of(case, mlp, setting)
    weights += list(mlp.parameters())

    def run() -> None:
        forward(hidden_states).backward(grad)

    return LayerCase(run, _saved_bytes(lambda: forward(hidden_states), weights))


def _base_mlp(setting: LayerSetting, generator: torch.Generator) -> LlamaMLP:
    config = LlamaConfig(
        hidden_size=setting.hidden_size, intermediate_size=setting.ffn_size, num_attention_heads=1
    )
    mlp = LlamaMLP(config).requires_grad_(False).to(setting.dtype)
    for weight in mlp.parameters():
        weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
    return mlp


def _forward_of(
    case: str, mlp: LlamaMLP, setting: LayerSetting
) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    if case == "frozen":
        return mlp, []
    if case == "peft-lora":
        return _peft(mlp, setting)
    step = StepSetting(rank=setting.rank, num_experts=setting.num_experts, top_k=setting.top_k)
    config = adapter_config(case, step).model_copy(update={"target_modules": "ffn"})
    adapter = METHODS[config.method](case, config, [_base_layer(mlp, setting)], torch.float32, 0)
    fill_B(adapter)
    slot = RunningSlot()
    block = FfnBlock(slot, 0, mlp, _SHAPE, "act_fn")

    def forward(hidden_states: Tensor) -> Tensor:
        layout = make_layout([case], setting.num_tokens, None, None, hidden_states.device)
        with slot.running(RunningForward(layout, {case: adapter})):
            return block(hidden_states)

    return forward, list(adapter.parameters())


def _base_layer(mlp: LlamaMLP, setting: LayerSetting) -> BaseLayer:
    projections = {
        name: BaseProjection(
            linear, f"layers.0.mlp.{name}", linear.in_features, linear.out_features
        )
        for name, linear in mlp.named_children()
        if isinstance(linear, nn.Linear)
    }
    return BaseLayer(0, "self_attn", {}, "mlp", projections, _SHAPE, setting.hidden_size)


def _peft(mlp: LlamaMLP, setting: LayerSetting) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    import peft

    config = peft.LoraConfig(
        r=setting.rank,
        lora_alpha=2 * setting.rank,
        lora_dropout=0.0,
        target_modules=["gate_proj", "up_proj", "down_proj"],
    )
    peft.inject_adapter_in_model(config, mlp)
    trained = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()  # as get_peft_model does by default
    fill_B(mlp)
    return mlp, list[Tensor](trained)


def _saved_bytes(forward: Callable[[], Tensor], weights: list[Tensor]) -> int:
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(saved.values())
