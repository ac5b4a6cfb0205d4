"""Mixture-of-experts checkpoints of transformers: the class of a mixture, and files of models.

A twin has the dense family's attention, norms and head, and in place of the FFN block a router and
whole experts: softmax over all experts, the top_k of it, renormalised to sum to 1. Families that
are not in the table have none: gemma's norms add 1 or come in other places, for instance.

safetensors' own writer wants all tensors of a file at once, which would be a layer with all of its
experts; here a tensor is made when its bytes are written.

Source: transformers 5.24, the classes' `modeling_*.py`, and `conversion_mapping.py` for the names
that their checkpoints have; https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.base import MoeFfn
from loraloom.errors import AdapterError

INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# Width of a shared expert that adds nothing; vLLM wants some.
_SILENT_SIZE = 16

# An index of a tensor.
Place = tuple[int | slice, ...]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a shape that is made when it is wanted."""

    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @staticmethod
    def of(tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), lambda: tensor)

    def part(self, place: Place) -> LazyTensor:
        shape = torch.empty(self.shape, device="meta")[place].shape
        return LazyTensor(tuple(shape), lambda: self.make()[place])


def write_shards(
    directory: Path, shards: Iterable[Mapping[str, LazyTensor]], num_shards: int, dtype: torch.dtype
) -> int:
    """Write a file for each shard and the index of their tensors; return their bytes."""
    files: dict[str, str] = {}
    total_bytes = 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{num_shards:05}.safetensors"
        total_bytes += _write_file(directory / name, shard, dtype)
        files |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total_bytes


def _write_file(path: Path, tensors: Mapping[str, LazyTensor], dtype: torch.dtype) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stop = 0
    for name, tensor in tensors.items():
        start, stop = stop, stop + math.prod(tensor.shape) * dtype.itemsize
        offsets = {"shape": tensor.shape, "data_offsets": [start, stop]}
        header[name] = {"dtype": _DTYPES[dtype], **offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format's alignment
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            value = tensor.make().to("cpu", dtype).contiguous()
            # The header is written already; another shape would shift all that follows.
            assert tuple(value.shape) == tuple(tensor.shape), name
            file.write(value.flatten().view(torch.uint8).numpy().data)
    return stop


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
    keeps_layer_types: bool = False

    def ffn_tensors(
        self, ffn: MoeFfn, shapes: Mapping[str, tuple[int, int]], dtype: torch.dtype
    ) -> Iterator[tuple[str, LazyTensor]]:
        """Give an FFN block's tensors by their names in the block."""
        yield self.router, LazyTensor.of(ffn.router)
        experts = [_expert(ffn, expert, shapes, dtype) for expert in range(ffn.num_experts)]
        if self.stacked:
            (gate, _, down), num_experts = experts[0], len(experts)
            inputs = (num_experts, 2 * gate.shape[0], gate.shape[1])
            yield (
                "input_linear.weight",
                LazyTensor(
                    inputs,
                    lambda: torch.stack([torch.cat([g.make(), u.make()]) for g, u, _ in experts]),
                ),
            )
            outputs = (num_experts, *down.shape)
            yield (
                "output_linear.weight",
                LazyTensor(outputs, lambda: torch.stack([d.make() for *_, d in experts])),
            )
        else:
            for number, weights in enumerate(experts):
                for name, weight in zip(self.names, weights, strict=True):
                    yield f"experts.{number}.{name}.weight", weight
        sizes = {"E": ffn.num_experts, "D": ffn.router.shape[1], "S": _SILENT_SIZE, "1": 1}
        for name, axes in self.zeros.items():
            yield name, LazyTensor.of(torch.zeros([sizes[axis] for axis in axes]))

    def stored_parts(self, name: str, shape: Sequence[int]) -> dict[str, Place]:
        """Say of which tensors of the checkpoint a tensor of a loaded layer is made."""
        inner = name.removeprefix(f"{self.loaded_block}.")
        experts = [f"{self.block}.experts.{expert}" for expert in range(shape[0])]
        gate, up, down = self.names
        if inner == name:
            return {name: ()}
        if inner == "experts.gate_up_proj":
            halves = {gate: slice(0, shape[1] // 2), up: slice(shape[1] // 2, None)}
            return {
                f"{expert}.{half}.weight": (place, rows)
                for place, expert in enumerate(experts)
                for half, rows in halves.items()
            }
        if inner == "experts.down_proj":
            return {f"{expert}.{down}.weight": (e,) for e, expert in enumerate(experts)}
        return {f"{self.block}.{inner}": ()}

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
            yield name.replace("qkv", letter), tensor.part((rows,))

    def config_fields(self, config: Mapping[str, Any], ffn: MoeFfn) -> dict[str, Any]:
        """Make the fields of the class's configuration from the dense family's."""
        family = {"architectures", "auto_map", "model_type", "transformers_version"}
        family |= {"quantization_config"}
        own = dict(zip(self.fields, (ffn.num_experts, ffn.top_k), strict=True))
        if self.size_field is not None:
            own[self.size_field] = config["intermediate_size"]
        if self.splits_qkv and not config.get("head_dim"):  # a long rope asks for it
            own["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
        kept = {name: value for name, value in config.items() if name not in family}
        return {**kept, **self.settings, **own}


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
    return fused.part((slice(0, half),)), fused.part((slice(half, None),)), down


_PER_TOKEN = "num_experts_per_tok"
_MIXTRAL = Twin(
    "mixtral",
    ("num_local_experts", _PER_TOKEN),
    {"router_jitter_noise": 0.0, "output_router_logits": False},
    block="block_sparse_moe",
    names=("w1", "w3", "w2"),
)
_QWEN3 = Twin(
    "qwen3_moe",
    ("num_experts", _PER_TOKEN),
    {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
    size_field="moe_intermediate_size",
)
_SHARED = {f"shared_expert.{name}.weight": "SD" for name in ("gate_proj", "up_proj")}

# From a dense family's `model_type` to the class that computes its mixtures.
TWINS: dict[str, Twin] = {
    "llama": _MIXTRAL,
    "mistral": _MIXTRAL,
    "phi3": replace(_MIXTRAL, splits_qkv=True),
    "qwen2": replace(
        _QWEN3,
        model_type="qwen2_moe",
        settings={
            **_QWEN3.settings,
            "shared_expert_intermediate_size": _SILENT_SIZE,
            "qkv_bias": True,
        },
        zeros=_SHARED | {"shared_expert.down_proj.weight": "DS", "shared_expert_gate.weight": "1D"},
        keeps_layer_types=True,
    ),
    "qwen3": _QWEN3,
    "granite": Twin(
        "granitemoe",
        ("num_local_experts", _PER_TOKEN),
        {"output_router_logits": False},
        block="block_sparse_moe",
        router="router.layer.weight",
        loaded_block="block_sparse_moe",
        stacked=True,
    ),
    "olmo2": Twin("flex_olmo", ("num_experts", _PER_TOKEN), {"norm_topk_prob": True}),
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
    ),
}

# From a mixture-of-experts class's `model_type` to what tells its checkpoint's names.
STORED: dict[str, Twin] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": TWINS["qwen2"],
    "qwen3_moe": _QWEN3,
    "olmoe": _QWEN3,
}


def twin_of(model_type: str) -> Twin:
    if model_type not in TWINS:
        raise AdapterError(
            f"a mixture's base model must be of a family that a mixture-of-experts class of "
            f"transformers computes exactly ({', '.join(TWINS)}), got {model_type}; no such class "
            "has its norms and activations, so serve the mixture with loraloom instead"
        )
    return TWINS[model_type]
