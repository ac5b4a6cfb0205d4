"""Where attention and FFN projections sit in each architecture. Adding a family is adding a row."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.base import BaseInfo, BaseLayer, BaseProjection, FfnShape
from loraloom.errors import ModelError, shown
from loraloom.models.quantised import is_linear, num_parameters, quantised_weight

_GATED = FfnShape(("gate_proj", "up_proj"), "down_proj")
_SPLIT_QKV = (("q_proj", "k_proj", "v_proj"), ("o_proj",))


@dataclass(frozen=True)
class Family:
    """One architecture's layout.

    Args:
        attention_inputs: Attention projections, grouped by the tensor they read.
        ffn_shape: Projections of the FFN block.
        layers: Path of the decoder layers.
        attention: Name of a layer's attention module.
        ffn: Name of a layer's FFN module.
        activation: Name of the FFN module's activation.
        logit_divisor: Config field that divides the head's logits.
        logit_softcap: Config field of the logits' soft cap.
    """

    attention_inputs: tuple[tuple[str, ...], ...] = _SPLIT_QKV
    ffn_shape: FfnShape = field(default_factory=lambda: _GATED)
    layers: str = "model.layers"
    attention: str = "self_attn"
    ffn: str = "mlp"
    activation: str = "act_fn"
    logit_divisor: str | None = None
    logit_softcap: str | None = None


_LLAMA = Family()
_GEMMA2 = Family(logit_softcap="final_logit_softcapping")

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi": Family(
        attention_inputs=(("q_proj", "k_proj", "v_proj"), ("dense",)),
        ffn_shape=FfnShape(("fc1",), "fc2"),
        activation="activation_fn",
    ),
    "phi3": Family(
        attention_inputs=(("qkv_proj",), ("o_proj",)),
        ffn_shape=FfnShape(("gate_up_proj",), "down_proj"),
        activation="activation_fn",
    ),
    "olmo2": _LLAMA,
    "granite": Family(logit_divisor="logits_scaling"),
    "stablelm": _LLAMA,
    "gpt_neox": Family(
        attention_inputs=(("query_key_value",), ("dense",)),
        ffn_shape=FfnShape(("dense_h_to_4h",), "dense_4h_to_h"),
        layers="gpt_neox.layers",
        attention="attention",
        activation="act",
    ),
    "smollm3": _LLAMA,
}


def family_of(model: nn.Module) -> Family:
    """Look a model's family up.

    Raises:
        ModelError: If it is not in the table; lists the families and the model's linear modules. Or
            if the model is compiled as a whole.
    """
    if hasattr(model, "_orig_mod") or model._compiled_call_impl is not None:
        raise ModelError(
            "model must not be compiled as a whole, as its rows may have different adapters in "
            "each forward; attach the model itself and compile its decoder layers: layer.compile()"
        )
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if family is None or not _has_path(model, family.layers) or not _has_head(model):
        linears = sorted(
            {name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m)}
        )
        raise ModelError(
            f"model family must be one of {', '.join(FAMILIES)} (as a causal LM), "
            f"got {shown(model_type)} ({type(model).__name__}); "
            f"its linear modules are {', '.join(linears) or 'none'}"
        )
    return family


def base_layers(model: nn.Module, family: Family) -> list[BaseLayer]:
    """List each decoder layer's projections."""
    config: Any = model.config
    attention = [name for group in family.attention_inputs for name in group]
    ffn = [*family.ffn_shape.inputs, family.ffn_shape.output]
    return [
        BaseLayer(
            index=index,
            attention_block=family.attention,
            attention=_projections(layer, index, family.attention, attention),
            ffn_block=family.ffn,
            ffn=_projections(layer, index, family.ffn, ffn),
            ffn_shape=family.ffn_shape,
            hidden_size=config.hidden_size,
        )
        for index, layer in enumerate(model.get_submodule(family.layers).children())
    ]


def _projections(
    layer: nn.Module, index: int, block: str, names: list[str]
) -> dict[str, BaseProjection]:
    modules = {name: layer.get_submodule(f"{block}.{name}") for name in names}
    return {
        name: BaseProjection(
            module,
            f"layers.{index}.{block}.{name}",
            module.in_features,  # pyright: ignore[reportArgumentType]
            module.out_features,  # pyright: ignore[reportArgumentType]
            quantised_weight(module),
        )
        for name, module in modules.items()
    }


def head_of(model: nn.Module, family: Family) -> Callable[..., Tensor]:
    """Return the function from final hidden states to logits, with scaling and soft cap.

    It takes another linear layer as a second argument, in place of the model's.
    """
    config: Any = model.config
    linear = model.get_output_embeddings()  # pyright: ignore
    divisor = getattr(config, family.logit_divisor) if family.logit_divisor else None
    softcap = getattr(config, family.logit_softcap) if family.logit_softcap else None

    def head(hidden_states: Tensor, linear: Callable[[Tensor], Tensor] = linear) -> Tensor:
        logits = linear(hidden_states)
        if divisor is not None:
            logits = logits / divisor
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits

    return head


def base_info(model: nn.Module, family: Family, layers: list[BaseLayer]) -> BaseInfo:
    """Describe a base model for the files of its adapters."""
    config: Any = model.config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore
    first = layers[0]
    blocks = {family.attention: first.attention, family.ffn: first.ffn}
    shapes = {
        f"{block}.{name}": (projection.out_features, projection.in_features)
        for block, projections in blocks.items()
        for name, projection in projections.items()
    }
    return BaseInfo(
        name_or_path=getattr(config, "_name_or_path", ""),
        model_type=config.model_type,
        layers_path=family.layers,
        attention=family.attention,
        ffn=family.ffn,
        attention_projections=tuple(first.attention),
        ffn_projections=tuple(first.ffn),
        activation=getattr(config, "hidden_act", None) or config.hidden_activation,
        num_layers=len(layers),
        hidden_size=first.hidden_size,
        shapes=shapes,
        num_parameters=num_parameters(model),
        fingerprint=_fingerprint(config.model_type, shapes, layers),
        quantization=_quantization(layers),
        modules=_other_modules(model),
        embedding=_path_of(model, embedding),
        head=_path_of(model, head),
        ties_head=embedding.weight is head.weight,
    )


def _other_modules(model: nn.Module) -> dict[str, dict[str, tuple[int, ...]]]:
    """Find embeddings, norms and the head, with their parameters' shapes."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # pyright: ignore
    found = {}
    for path, module in model.named_modules():
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        is_norm = not any(module.children()) and all(len(shape) == 1 for shape in shapes.values())
        if shapes and (module in tables or is_norm):
            found[path] = shapes
    return found


def _path_of(model: nn.Module, module: nn.Module) -> str:
    return next(path for path, other in model.named_modules() if other is module)


def _fingerprint(
    model_type: str, shapes: dict[str, tuple[int, int]], layers: list[BaseLayer]
) -> str:
    digest = hashlib.sha256(f"{model_type} {len(layers)} {sorted(shapes.items())}".encode())
    for layer in (layers[0], layers[len(layers) // 2], layers[-1]):
        for projection in (*layer.attention.values(), *layer.ffn.values()):
            if projection.device.type == "meta":  # one without weights is known by its shapes
                continue
            corner = projection.first_weights(64)
            digest.update(corner.to(torch.bfloat16).view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _quantization(layers: list[BaseLayer]) -> str | None:
    """Name how the first quantised projection is kept; some may be left in floating point."""
    kept = (
        p.quantised for layer in layers for block in layer.blocks.values() for p in block.values()
    )
    return next((weight.kind for weight in kept if weight is not None), None)


def _has_head(model: nn.Module) -> bool:
    """Whether it maps hidden states to a vocabulary; a classifier has other heads."""
    return model.get_output_embeddings() is not None  # pyright: ignore


def _has_path(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
