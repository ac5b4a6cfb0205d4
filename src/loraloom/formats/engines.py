"""LoRAs in the files that vLLM and SGLang load, which differ from PEFT's on stacked experts.

    {layers}.{L}.{experts}.{e}.{gate_proj|up_proj|down_proj}.lora_A.weight    of one expert

Gate and up repeat their A. For types whose experts vLLM loads as stacks, it reads PEFT's names.
Scales of rsLoRA and of patterns are folded into B, and all ranks are padded to the largest.

Axes: E experts of the base model, R rank, I in_features, O out_features.

Source: vllm 0.33.0, `vllm/lora/{lora_model,model_manager,peft_helper}.py`; sglang 0.5.23,
`sglang/srt/lora/{lora,layers,mem_pool}.py`.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import pad

from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.extra_modules import refuse_own_parts
from loraloom.adapters.lora import LoraConfig, with_all_experts
from loraloom.adapters.tensor_names import TensorKey
from loraloom.base.blocks import BaseInfo, BaseProjection
from loraloom.errors import AdapterError
from loraloom.formats.experts import INTERLEAVED
from loraloom.formats.fields import is_parameter_in_peft
from loraloom.formats.layouts import render
from loraloom.formats.raw_files import AdapterFiles

Engine = Literal["vllm", "sglang"]

_TITLES = {"vllm": "vLLM 0.33", "sglang": "SGLang 0.5.23"}
_PARTS = ("gate_proj", "up_proj", "down_proj")
_MIXTRALS = ("w1", "w3", "w2")
# How vLLM names a block and the projections of its experts, by the base model's type.
_VLLM_NAMES = {
    **dict.fromkeys(
        "qwen2_moe qwen3_moe qwen3_next olmoe glm4_moe ernie4_5_moe deepseek_v3".split(),
        ("mlp.experts", _PARTS),
    ),
    **dict.fromkeys(("mixtral", "phimoe"), ("block_sparse_moe.experts", _MIXTRALS)),
    "minimax_m2": ("mlp.experts", _MIXTRALS),
    "lfm2_moe": ("feed_forward.experts", _MIXTRALS),
}
# Types whose LoRAs on experts are stacks in vLLM as well.
_VLLM_STACKS = (*INTERLEAVED, "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_vl_moe")


def engine_files(
    config: AdapterConfig, tensors: Mapping[str, Tensor], base: BaseInfo, engine: Engine
) -> AdapterFiles:
    """Lay a LoRA out as an engine reads it.

    Raises:
        AdapterError: If the engine has no such adapter.
    """
    title = _TITLES[engine]
    lora = _check_method(config, title)
    refuse_own_parts(config, "the adapter", f"be loaded by {title}")
    layers = base.layers_without_weights()
    adapted = lora.adapted(layers)
    has_stacks = any(projection.num_experts is not None for projection in adapted)
    _check_not_beside(adapted, title)
    _check_projections(adapted, title)
    lora, tensors = with_all_experts(lora, tensors, layers)
    plain, tensors = _folded(lora, tensors, [projection.key for projection in adapted])
    single = {}
    if has_stacks and not (engine == "vllm" and base.model_type in _VLLM_STACKS):
        single = _single_experts(tensors, base, engine)
        tensors = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 2}
    files = render(plain, tensors, base)
    named = files.tensors | single
    modules = {name.rpartition(".lora_")[0].rpartition(".")[2] for name in named}
    fields: dict[str, Any] = {
        **files.config,
        "layers_to_transform": None,
        "target_modules": sorted(modules - {"experts", "base_layer"}),
    }
    # An engine finds linear layers by their names in `target_modules`.
    parameters = fields.pop("target_parameters", [])
    stacks = [name for name in parameters if not name.endswith(".weight")]
    if stacks and not single:
        fields["target_parameters"] = stacks
    return replace(files, config=fields, tensors=named, metadata={"format": "pt"})


def _check_method(config: AdapterConfig, title: str) -> LoraConfig:
    if not isinstance(config, LoraConfig):
        raise AdapterError(
            f"{title} does not load {config.title}; serve the adapter with `loraloom serve`"
        )
    if config.weight_decomposition:
        raise AdapterError(
            f"{title} does not load DoRA; write a merged model with `loraloom export --to merged`"
        )
    return config


def as_peft_holds(
    config: AdapterConfig, tensors: Mapping[str, Tensor], base: BaseInfo
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Return what PEFT has of an adapter: all of it, but for the dropout of experts.

    Raises:
        AdapterError: If PEFT 0.21 has no such adapter.
    """
    if config.layout != "peft":
        raise AdapterError(
            f"PEFT does not support {config.title}; `import loraloom.peft` lets PEFT read native "
            "files, and `loraloom export` writes mixtures of whole FFN blocks as MoE checkpoints"
        )
    layers = base.layers_without_weights()
    adapted = config.adapted(layers)
    _check_not_beside(adapted, "PEFT")
    config, tensors = with_all_experts(config, tensors, layers)
    if any(is_parameter_in_peft(projection, base) for projection in adapted):
        _check_method(config, f"PEFT, on experts of {base.model_type},")
        config = config.model_copy(update={"dropout": 0.0})
    return config, tensors


def _check_not_beside(adapted: list[BaseProjection], title: str) -> None:
    blocks = [projection.key for projection in adapted if not projection.has_weight]
    if blocks:
        raise AdapterError(
            f"{title} has no updates next to a block, got one at {blocks[0]}; serve the adapter "
            "with `loraloom serve`"
        )


def _check_projections(adapted: list[BaseProjection], title: str) -> None:
    by_block: dict[str, set[str]] = {}
    for projection in adapted:
        if projection.num_experts is not None:
            by_block.setdefault(projection.key.rpartition(".")[0], set()).add(projection.name)
    for block, names in by_block.items():
        if names != {"gate_up_proj", "down_proj"}:
            raise AdapterError(
                f"{title} loads LoRAs on gate_up_proj and down_proj of experts together, got "
                f"{', '.join(sorted(names))} at {block}; train with target_modules [experts], or "
                "serve the adapter with `loraloom serve`"
            )


def _folded(
    config: LoraConfig, tensors: Mapping[str, Tensor], keys: list[str]
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Give all projections one rank, and the scale 1 where scales differ from alpha / rank."""
    if not (config.rank_pattern or config.alpha_pattern or config.rank_stabilized):
        return config, dict(tensors)
    rank = max(config.at(key).rank for key in keys)
    folded = {}
    for name, tensor in tensors.items():
        key = TensorKey.parse(name)
        assert key is not None
        missing = rank - config.at(key.place).rank
        if key.part == "lora_A":
            folded[name] = pad(tensor, (0, 0, 0, missing))
        else:
            folded[name] = pad(tensor * config.scaling_of(key), (0, missing))
    settings = {"rank": rank, "alpha": float(rank), "rank_stabilized": False}
    return config.model_copy(update=settings | {"rank_pattern": {}, "alpha_pattern": {}}), folded


def _single_experts(
    tensors: Mapping[str, Tensor], base: BaseInfo, engine: Engine
) -> dict[str, Tensor]:
    path, parts = None, _PARTS
    if engine == "vllm":
        if base.model_type not in _VLLM_NAMES:
            raise AdapterError(
                f"the experts' names in vLLM are unknown for the type {base.model_type or 'none'}, "
                f"and known for {', '.join([*_VLLM_NAMES, *_VLLM_STACKS])}; pass --base-model if "
                "the files lack the type, or serve the adapter with `loraloom serve`"
            )
        path, parts = _VLLM_NAMES[base.model_type]
    gate, up, down = parts
    single = {}
    for name, tensor in tensors.items():
        key = TensorKey.parse(name)
        if key is None or tensor.dim() == 2:
            continue
        prefix = f"base_model.model.{base.layers_path}.{key.layer}.{path or key.block}"
        for expert, matrix in enumerate(tensor):
            if key.projection != "gate_up_proj":
                matrices = {down: matrix}
            elif key.part == "lora_A":  # both read all of it
                matrices = {gate: matrix, up: matrix}
            elif base.model_type in INTERLEAVED:
                matrices = {gate: matrix[0::2], up: matrix[1::2]}
            else:
                matrices = dict(zip((gate, up), matrix.chunk(2), strict=True))
            for projection, values in matrices.items():
                single[f"{prefix}.{expert}.{projection}.{key.part}.weight"] = values.contiguous()
    return single
