"""One FFN layer, forward and backward, and the activations that it keeps for the backward pass.

Axes: T tokens, D hidden, F feed-forward.

Cases: `frozen` is the base's FFN with a gradient to its input only; `peft-lora` is PEFT's LoRA on
its three projections (plain autograd, float32 adapters), `peft-lora-tuned` the same in autocast;
the others are loraloom's.

    python -m benchmarks.layer --hidden-size 2048 --ffn-size 5632 --num-tokens 1024
    python -m benchmarks.layer --over num-experts --values 8 16 64   # one case over a size
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.cases import (
    ADAPTERS,
    MIXTURE,
    PEFT_CASES,
    StepSetting,
    adapter_config,
    add_cases,
    alternate,
    fill_B,
    print_figures,
)
from loraloom.base.blocks import BaseLayer, BaseProjection, Block
from loraloom.host.forward import ForwardContext, running
from loraloom.host.layout import make_layout
from loraloom.host.wiring import FfnBlock
from loraloom.ops.gating import ActivationGating


@dataclass(frozen=True)
class LayerSetting:
    """Sizes of the layer: D, F, T, the rank, the mixture's experts, and adapters that share T."""

    hidden_size: int = 576
    ffn_size: int = 1536
    num_tokens: int = 2048
    rank: int = 8
    num_experts: int = 8
    top_k: int = 2
    num_adapters: int = 1
    dtype: torch.dtype = torch.bfloat16


SCALED = [field.name.replace("_", "-") for field in fields(LayerSetting) if field.name != "dtype"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for field, size in zip(SCALED, vars(LayerSetting()).values(), strict=False):
        parser.add_argument(f"--{field}", type=int, default=size)
    add_cases(parser, (*PEFT_CASES, "frozen", *ADAPTERS), rounds=9)
    parser.add_argument("--over", choices=SCALED, help="a size to vary, for --case alone")
    parser.add_argument("--values", type=int, nargs="+", default=[], help="of it")
    parser.add_argument("--case", choices=ADAPTERS, default=MIXTURE)
    options = vars(parser.parse_args(arguments))
    sizes = {name.replace("-", "_"): options[name.replace("-", "_")] for name in SCALED}
    setting, over = LayerSetting(**sizes), options["over"]
    if over is None:
        layers = {case: make_layer(case, setting) for case in options["cases"]}
    else:
        settings = [replace(setting, **{over.replace("-", "_"): n}) for n in options["values"]]
        layers = {
            f"{over} {value}": make_layer(options["case"], one)
            for value, one in zip(options["values"], settings, strict=True)
        }
    times = alternate({name: layer.run for name, layer in layers.items()}, options["rounds"])
    figures = {
        name: {"ms": 1e3 * times[name], "saved MB": layer.saved_bytes / 1e6}
        for name, layer in layers.items()
    }
    if over is not None:
        steps = alternate({name: one.optimise for name, one in layers.items()}, options["rounds"])
        figures = {n: {**values, "AdamW ms": 1e3 * steps[n]} for n, values in figures.items()}
    print_figures(figures)


@dataclass(frozen=True)
class LayerCase:
    """A layer ready to run.

    Args:
        run: One forward and backward.
        optimise: One step of AdamW on the trained weights, after `run`.
        saved_bytes: Activations kept between the two: unique storages, weights left out.
    """

    run: Callable[[], None]
    optimise: Callable[[], object]
    saved_bytes: int


def make_layer(case: str, setting: LayerSetting) -> LayerCase:
    """Build a layer of a case with random weights."""
    generator = torch.Generator().manual_seed(0)
    mlp = _base_mlp(setting, generator)
    adapters = setting.num_adapters
    shape = (adapters, setting.num_tokens // adapters, setting.hidden_size)
    hidden_states = torch.randn(shape, generator=generator).to(setting.dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to(setting.dtype)
    forward, trained = _forward_of(case, mlp, setting)
    optimise = torch.optim.AdamW(trained, fused=True).step if trained else lambda: None
    weights = [*trained, *mlp.parameters()]

    def run() -> None:
        forward(hidden_states).backward(grad)

    return LayerCase(run, optimise, _saved_bytes(lambda: forward(hidden_states), weights))


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
    if case.startswith("peft-lora"):
        return _peft(mlp, setting, tuned=case.endswith("tuned"))
    step = StepSetting(rank=setting.rank, num_experts=setting.num_experts, top_k=setting.top_k)
    config = adapter_config(case, step, target_modules="ffn")
    layers = [_base_layer(mlp, setting)]
    adapters = {
        name: config.build(name, layers, torch.float32, seed)
        for seed, name in enumerate(f"{case}-{index}" for index in range(setting.num_adapters))
    }
    for adapter in adapters.values():
        fill_B(adapter)
    owner = object()
    block = FfnBlock(owner, layers[0].blocks[0], mlp)

    def forward(hidden_states: Tensor) -> Tensor:
        rows = [(adapter, 1.0) for adapter in adapters.values()]
        layout = make_layout(rows, hidden_states.shape[1], None, None, hidden_states.device)
        context = ForwardContext(owner, layout, record={})
        with running(context):
            return block(hidden_states)

    return forward, [weight for adapter in adapters.values() for weight in adapter.parameters()]


def _base_layer(mlp: LlamaMLP, setting: LayerSetting) -> BaseLayer:
    projections = {
        name: BaseProjection(linear, f"layers.0.mlp.{name}")
        for name, linear in mlp.named_children()
        if isinstance(linear, nn.Linear)
    }
    block = Block(
        layer=0,
        path="mlp",
        kind="ffn",
        groups=(("gate_proj", "up_proj"), ("down_proj",)),
        projections=projections,
        hidden_size=setting.hidden_size,
        gating=ActivationGating(mlp.act_fn),
    )
    return BaseLayer(0, "model.layers.0", (block,), setting.hidden_size)


def _peft(
    mlp: LlamaMLP, setting: LayerSetting, *, tuned: bool
) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
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

    def forward(hidden_states: Tensor) -> Tensor:
        with torch.autocast("cpu", setting.dtype, enabled=tuned):
            return mlp(hidden_states)

    return forward, list[Tensor](trained)


def _saved_bytes(forward: Callable[[], Tensor], weights: list[Tensor]) -> int:
    own = {weight.untyped_storage().data_ptr() for weight in weights}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output kept as it is would keep its own node, for good

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(saved.values())


if __name__ == "__main__":
    main()
