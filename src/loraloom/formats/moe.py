"""Which mixture-of-experts class of transformers computes what a mixture on a dense family does.

A twin has the dense family's attention, norms and head, and in place of the FFN block a router and
whole experts: softmax over all experts, the top_k of it, renormalised to sum to 1. Families that
are not in the table have none: gemma's norms add 1 or come in other places, for instance.

Source: transformers 5.24, the classes' `modeling_*.py`, and `conversion_mapping.py` for the names
that their checkpoints have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from loraloom.adapters.base import MoeFfn
from loraloom.errors import AdapterError
from loraloom.formats.checkpoint import LazyTensor

SILENT_SIZE = 16
"""Width of a shared expert that adds nothing; vLLM wants some."""
_OWN_FIELDS = (
    "architectures",
    "auto_map",
    "model_type",
    "transformers_version",
    "quantization_config",
)
"""Fields of a configuration that are not the twin's."""


Place = tuple[int | slice, ...]
"""An index of a tensor."""


@dataclass(frozen=True)
class Twin:
    """A mixture-of-experts class.

    Args:
        model_type: Its name in transformers.
        fields: Its configuration's fields for the number of experts and for top_k.
        settings: Further fields.
        size_field: The field of the experts' width; None where it is the dense family's.
        block: Name of the block in a decoder layer.
        router: Name of the router's weight in it.
        names: Of an expert's gate, up and down.
        stacked: Experts are one tensor.
        zeros: Tensors of the block that must add nothing, by name, and their axes; S is the width
            of a shared expert.
        splits_qkv: The dense family's q, k and v are one projection, the class's three.
        loaded_block: Name of the block in the class itself.
        loaded_names: Names of its tensors there, where they are not the checkpoint's.
        keeps_layer_types: Layers may differ in their attention, as the dense family's do.
    """

    model_type: str
    fields: tuple[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    size_field: str | None = None
    block: str = "mlp"
    router: str = "gate.weight"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    stacked: bool = False
    zeros: Mapping[str, str] = field(default_factory=dict)
    splits_qkv: bool = False
    loaded_block: str = "mlp"
    loaded_names: Mapping[str, str] = field(default_factory=dict)
    keeps_layer_types: bool = False

    def ffn_tensors(
        self, ffn: MoeFfn, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype
    ) -> Iterator[tuple[str, LazyTensor]]:
        """Give an FFN block's tensors by their names in the block."""
        yield self.router, LazyTensor.of(ffn.router)
        experts = [_expert(ffn, expert, shapes, dtype) for expert in range(ffn.num_experts)]
        if self.stacked:
            yield from _stacked_experts(experts)
        else:
            for number, weights in enumerate(experts):
                for name, weight in zip(self.names, weights, strict=True):
                    yield f"experts.{number}.{name}.weight", weight
        sizes = {"E": ffn.num_experts, "D": ffn.router.shape[1], "S": SILENT_SIZE, "1": 1}
        for name, axes in self.zeros.items():
            yield name, LazyTensor.of(torch.zeros([sizes[axis] for axis in axes]))

    def stored_parts(self, name: str, shape: Sequence[int]) -> dict[str, Place]:
        """Say of which tensors of the checkpoint a tensor of a loaded layer is made."""
        inner = name.removeprefix(f"{self.loaded_block}.")
        if inner == name:
            return {name: ()}
        gate, up, down = self.names
        size = shape[1] // 2 if len(shape) > 1 else 0
        experts = [f"{self.block}.experts.{expert}" for expert in range(shape[0])]
        match inner, self.stacked:
            case "experts.gate_up_proj", False:
                halves = {gate: slice(0, size), up: slice(size, None)}
                return {
                    f"{expert}.{half}.weight": (place, rows)
                    for place, expert in enumerate(experts)
                    for half, rows in halves.items()
                }
            case "experts.down_proj", False:
                return {f"{expert}.{down}.weight": (e,) for e, expert in enumerate(experts)}
        return {f"{self.block}.{self.loaded_names.get(inner, inner)}": ()}

    def rename(
        self, name: str, tensor: LazyTensor, config: Any
    ) -> Iterator[tuple[str, LazyTensor]]:
        """Give a tensor of a decoder layer, outside of its FFN block, by the class's names."""
        if not self.splits_qkv or "qkv_proj" not in name:
            yield name, tensor
            return
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        heads = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        start = 0
        for letter, num_heads in zip("qkv", heads, strict=True):
            rows = slice(start, start + head_dim * num_heads)
            start = rows.stop
            yield name.replace("qkv", letter), _rows(tensor, rows)

    def config_fields(self, config: Mapping[str, Any], ffn: MoeFfn) -> dict[str, Any]:
        """Make the fields of the class's configuration from the dense family's."""
        fields = {name: value for name, value in config.items() if name not in _OWN_FIELDS}
        own = dict(zip(self.fields, (ffn.num_experts, ffn.top_k), strict=True))
        if self.size_field is not None:
            own[self.size_field] = config["intermediate_size"]
        if self.splits_qkv and not config.get("head_dim"):  # a long rope asks for it
            own["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        return {**fields, **self.settings, **own}


def _expert(
    ffn: MoeFfn, expert: int, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype
) -> Sequence[LazyTensor]:
    """Give an expert's gate, up and down; a fused gate_up is cut into halves."""
    weights = [
        LazyTensor(shape, lambda name=name: ffn.weight(expert, name, dtype))
        for name, shape in shapes.items()
    ]
    if len(weights) == 3:
        return weights
    fused, down = weights
    half = fused.shape[0] // 2
    return _rows(fused, slice(0, half)), _rows(fused, slice(half, 2 * half)), down


def _rows(tensor: LazyTensor, rows: slice) -> LazyTensor:
    shape = (rows.stop - rows.start, *tensor.shape[1:])
    return LazyTensor(shape, lambda: tensor.make()[rows])


def _stacked_experts(experts: Sequence[Sequence[LazyTensor]]) -> Iterator[tuple[str, LazyTensor]]:
    gate, _, down = experts[0]
    shape = (len(experts), 2 * gate.shape[0], gate.shape[1])
    yield (
        "input_linear.weight",
        LazyTensor(
            shape, lambda: torch.stack([torch.cat([g.make(), u.make()]) for g, u, _ in experts])
        ),
    )
    yield (
        "output_linear.weight",
        LazyTensor(
            (len(experts), *down.shape), lambda: torch.stack([d.make() for *_, d in experts])
        ),
    )


_MIXTRAL = Twin(
    "mixtral",
    ("num_local_experts", "num_experts_per_tok"),
    {"router_jitter_noise": 0.0, "output_router_logits": False},
    block="block_sparse_moe",
    names=("w1", "w3", "w2"),
)
_QWEN_SETTINGS = {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}

TWINS: dict[str, Twin] = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "phi3": replace(_MIXTRAL, splits_qkv=True),
    "qwen2": Twin(
        "qwen2_moe",
        ("num_experts", "num_experts_per_tok"),
        _QWEN_SETTINGS | {"shared_expert_intermediate_size": SILENT_SIZE, "qkv_bias": True},
        size_field="moe_intermediate_size",
        zeros={
            "shared_expert.gate_proj.weight": "SD",
            "shared_expert.up_proj.weight": "SD",
            "shared_expert.down_proj.weight": "DS",
            "shared_expert_gate.weight": "1D",
        },
        keeps_layer_types=True,
    ),
    "qwen3": Twin(
        "qwen3_moe",
        ("num_experts", "num_experts_per_tok"),
        _QWEN_SETTINGS,
        size_field="moe_intermediate_size",
    ),
    "granite": Twin(
        "granitemoe",
        ("num_local_experts", "num_experts_per_tok"),
        {"output_router_logits": False},
        block="block_sparse_moe",
        router="router.layer.weight",
        loaded_block="block_sparse_moe",
        loaded_names={
            "router.weight": "router.layer.weight",
            "experts.gate_up_proj": "input_linear.weight",
            "experts.down_proj": "output_linear.weight",
        },
        stacked=True,
    ),
    "olmo2": Twin("flex_olmo", ("num_experts", "num_experts_per_tok"), {"norm_topk_prob": True}),
    "ernie4_5": Twin(
        "ernie4_5_moe",
        ("moe_num_experts", "moe_k"),
        {
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        },
        size_field="moe_intermediate_size",
        zeros={"moe_statics.e_score_correction_bias": "1E"},
        loaded_names={
            "gate.moe_statics.e_score_correction_bias": "moe_statics.e_score_correction_bias"
        },
    ),
}
"""From a dense family's `model_type` to the class that computes its mixtures."""


STORED: dict[str, Twin] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": TWINS["qwen2"],
    "qwen3_moe": TWINS["qwen3"],
    "olmoe": TWINS["qwen3"],
}
"""From a mixture-of-experts class's `model_type` to what tells its checkpoint's names."""


def twin_of(model_type: str) -> Twin:
    """Look a family's twin up."""
    if model_type not in TWINS:
        raise AdapterError(
            f"a mixture's base model must be of a family that a mixture-of-experts class of "
            f"transformers computes exactly ({', '.join(TWINS)}), got {model_type}; no such class "
            "has its norms and activations, so serve the mixture with loraloom instead"
        )
    return TWINS[model_type]
