"""Where attention and FFN projections sit in each architecture. Adding a family is adding a row.

What is in no row is looked for by structure.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as _CACHES
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from loraloom.adapters.base import BaseInfo, BaseLayer, BaseProjection, FfnShape
from loraloom.errors import ModelError
from loraloom.models.quantization import is_linear, num_parameters, quantised_weight

# The FFN block is no dense one, but a mixture of experts.
EXPERTS = FfnShape((), "")
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Family:
    """One architecture's layout.

    Args:
        attention_inputs: Attention projections, grouped by the tensor they read. Layers whose
            attention has others have none.
        layers: Path of the decoder layers, whose `attention` and `ffn` are modules.
        activation: Name of the FFN module's activation, or where it has none, transformers' name.
        logit_divisor: Config field that divides the head's logits; `logit_factor` multiplies them.
        logit_softcap: Config field of the logits' soft cap.
        in_table: It has a row here.
    """

    attention_inputs: tuple[tuple[str, ...], ...] = (_QKV, ("o_proj",))
    ffn_shape: FfnShape = FfnShape(("gate_proj", "up_proj"), "down_proj")  # noqa: RUF009
    layers: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    activation: str = "act_fn"
    logit_divisor: str | None = None
    logit_factor: str | None = None
    logit_softcap: str | None = None
    in_table: bool = True

    @property
    def attention_projections(self) -> tuple[str, ...]:
        return tuple(name for group in self.attention_inputs for name in group)

    def has_attention(self, layer: nn.Module) -> bool:
        names = [f"{self.attention}.{name}" for name in self.attention_projections]
        linears = {name for name, module in layer.named_modules() if is_linear(module)}
        return linears.issuperset(names)


_LLAMA = Family()
_SOFTCAPPED = Family(logit_softcap="final_logit_softcapping")
_FUSED = Family(ffn_shape=FfnShape(("gate_up_proj",), "down_proj"), activation="activation_fn")
_UNGATED = Family(ffn_shape=FfnShape(("up_proj",), "down_proj"))
_FC = Family(ffn_shape=FfnShape(("fc1",), "fc2"), activation="activation_fn")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _SOFTCAPPED),
    "phi": replace(_FC, attention_inputs=(_QKV, ("dense",))),
    "phi3": replace(_FUSED, attention_inputs=(("qkv_proj",), ("o_proj",))),
    "olmo2": _LLAMA,
    "granite": Family(logit_divisor="logits_scaling"),
    "stablelm": _LLAMA,
    "gpt_neox": Family(
        attention_inputs=(("query_key_value",), ("dense",)),
        ffn_shape=FfnShape(("dense_h_to_4h",), "dense_4h_to_h"),
        activation="act",
        layers="gpt_neox.layers",
        attention="attention",
    ),
    **dict.fromkeys(("smollm3", "olmo", "olmo3", "ministral", "ministral3", "ernie4_5"), _LLAMA),
    **dict.fromkeys(("exaone4", "hunyuan_v1_dense", "seed_oss", "helium"), _LLAMA),
    "hyperclovax": Family(logit_factor="logits_scaling"),
    **dict.fromkeys(("glm", "glm4"), _FUSED),
    "starcoder2": Family(ffn_shape=FfnShape(("c_fc",), "c_proj"), activation="act"),
    **dict.fromkeys(("nemotron", "arcee", "apertus", "jais2"), _UNGATED),
    **dict.fromkeys(("cohere", "cohere2"), Family(logit_factor="logit_scale")),
    "nanochat": replace(_FC, logit_softcap="final_logit_softcapping"),
    "lfm2": Family(
        attention_inputs=(_QKV, ("out_proj",)),
        ffn_shape=FfnShape(("w1", "w3"), "w2"),
        ffn="feed_forward",
        activation="silu",
    ),
    "qwen3_5_text": _LLAMA,
    **dict.fromkeys(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), Family(ffn_shape=EXPERTS)
    ),
    **dict.fromkeys(("gemma3", "mistral3"), Family(layers="model.language_model.layers")),
}


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's text part; most models are nothing else."""
    return model.config.get_text_config()  # pyright: ignore


def keeps_running_states(config: Any) -> bool:
    """Whether some layers keep one state of all tokens before, in place of keys and values."""
    kinds = getattr(config, "layer_types", None) or ()
    return any(
        issubclass(_CACHES.get(kind, object), LinearAttentionCacheLayerMixin) for kind in kinds
    )


def base_layers(model: nn.Module, family: Family) -> list[BaseLayer]:
    hidden_size = text_config(model).hidden_size
    layers = []
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        attends = family.has_attention(layer)
        names = family.attention_projections
        attention = _projections(layer, index, family.attention, names if attends else ())
        ffn = _projections(layer, index, family.ffn, family.ffn_shape.names)
        blocks = (family.attention, attention, family.ffn, ffn)
        layers.append(BaseLayer(index, *blocks, family.ffn_shape, hidden_size))
    shapes = _shapes(layers)
    for layer in layers:
        for path, size in _shapes([layer]).items():
            if size != shapes[path]:
                raise ModelError(
                    f"decoder layers must have projections of the same size, got {path} with "
                    f"{list(size)} in layer {layer.index} and {list(shapes[path])} in another"
                )
    return layers


def _projections(
    layer: nn.Module, index: int, block: str, names: Sequence[str]
) -> dict[str, BaseProjection]:
    projections = {}
    for name in names:
        linear: Any = layer.get_submodule(f"{block}.{name}")
        sizes = (linear.in_features, linear.out_features)
        key = f"layers.{index}.{block}.{name}"
        projections[name] = BaseProjection(linear, key, *sizes, quantised_weight(linear))
    return projections


def _shapes(layers: Sequence[BaseLayer]) -> dict[str, tuple[int, int]]:
    return {
        f"{block}.{name}": (projection.out_features, projection.in_features)
        for layer in layers
        for block, projections in layer.blocks.items()
        for name, projection in projections.items()
    }


def activation_of(ffn: nn.Module, family: Family) -> Callable[[Tensor], Tensor]:
    own: Callable[[Tensor], Tensor] | None = getattr(ffn, family.activation, None)
    return ACT2FN[family.activation] if own is None else own


def head_of(model: nn.Module, family: Family) -> Callable[..., Tensor]:
    """Return the function from final hidden states, maybe by another linear layer, to logits."""
    config = text_config(model)
    linear = model.get_output_embeddings()  # pyright: ignore
    fields = (family.logit_divisor, family.logit_factor, family.logit_softcap)
    divisor, factor, softcap = (getattr(config, name) if name else None for name in fields)

    def head(hidden_states: Tensor, linear: Callable[[Tensor], Tensor] = linear) -> Tensor:
        logits = linear(hidden_states)
        if divisor is not None:
            logits = logits / divisor
        if factor is not None:
            logits = logits * factor
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    return head


def base_info(model: nn.Module, family: Family, layers: list[BaseLayer]) -> BaseInfo:
    """Describe a base model for the files of its adapters."""
    config: Any = model.config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore
    shapes, text = _shapes(layers), text_config(model)
    with_attention = tuple(layer.index for layer in layers if layer.attention)
    blocks = [block for layer in layers for block in layer.blocks.values()]
    projections = [projection for block in blocks for projection in block.values()]
    kinds = (one.quantised.kind for one in projections if one.quantised is not None)
    activations = (getattr(text, name, None) for name in ("hidden_act", "hidden_activation"))
    named = (name for name in activations if isinstance(name, str))
    paths = {id(module): path for path, module in model.named_modules()}
    own = {id(projection.linear) for projection in projections}
    others = {
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if is_linear(module) and id(module) not in own
    }
    return BaseInfo(
        name_or_path=getattr(config, "_name_or_path", ""),
        model_type=config.model_type,
        layers_path=family.layers,
        attention=family.attention,
        ffn=family.ffn,
        attention_projections=family.attention_projections,
        ffn_projections=family.ffn_shape.names,
        activation=next(named, family.activation),
        num_layers=len(layers),
        hidden_size=layers[0].hidden_size,
        shapes=shapes,
        num_parameters=num_parameters(model),
        fingerprint=_fingerprint(config.model_type, shapes, layers),
        quantization=next(kinds, None),  # of the first; some may be left in floating point
        modules=_other_modules(model, family),
        embedding=paths[id(embedding)],
        head=paths[id(head)],
        ties_head=embedding.weight is head.weight,
        attention_layers=with_attention if len(with_attention) < len(layers) else None,
        has_own_names=all(others.isdisjoint(block) for block in blocks),
    )


def _other_modules(model: nn.Module, family: Family) -> dict[str, dict[str, tuple[int, ...]]]:
    """Find embeddings, norms of the text model and the head, with their parameters' shapes."""
    text_model = family.layers.rpartition(".")[0]
    activation = f".{family.ffn}.{family.activation}"
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # pyright: ignore
    found = {}
    for path, module in model.named_modules():
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        is_leaf = path.startswith(f"{text_model}.") and not any(module.children())
        is_norm = (
            is_leaf
            and all(len(shape) == 1 for shape in shapes.values())
            # A gated norm takes its gate too.
            and len(signature(type(module).forward).parameters) == 2
            and not path.endswith(activation)
        )
        if shapes and (module in tables or is_norm):
            found[path] = shapes
    return found


def _fingerprint(
    model_type: str, shapes: dict[str, tuple[int, int]], layers: list[BaseLayer]
) -> str:
    digest = hashlib.sha256(f"{model_type} {len(layers)} {sorted(shapes.items())}".encode())
    adapted = [layer for layer in layers if layer.attention or layer.ffn]
    for layer in (adapted[0], adapted[len(adapted) // 2], adapted[-1]):
        for projection in (*layer.attention.values(), *layer.ffn.values()):
            if projection.device.type == "meta":  # one without weights is known by its shapes
                continue
            corner = projection.weight.detach().flatten()[:64]
            digest.update(corner.to(torch.bfloat16).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
