"""What an architecture is made of: where adapters attach, and what its files say of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as _CACHES
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from loraloom.adapters.base import BaseInfo, BaseLayer, BaseProjection, FfnShape
from loraloom.errors import ModelError
from loraloom.models.fingerprint import fingerprint, first_fingerprint
from loraloom.models.quantization import is_linear, num_parameters, quantised_weight

# The FFN block is no dense one, but a mixture of experts.
EXPERTS = FfnShape((), "")


@dataclass(frozen=True)
class Family:
    """One architecture's layout; layers whose attention has other projections have none."""

    attention_inputs: tuple[tuple[str, ...], ...]  # projections, by the tensor they read
    ffn_shape: FfnShape
    layers: str  # path of the decoder layers
    attention: str  # a layer's modules
    ffn: str
    activation: str  # the FFN module's name of it, or where it has none, transformers'
    logit_divisor: float | None = None
    logit_factor: float | None = None
    logit_softcap: float | None = None

    @property
    def attention_projections(self) -> tuple[str, ...]:
        return tuple(name for group in self.attention_inputs for name in group)

    def has_attention(self, layer: nn.Module) -> bool:
        names = [f"{self.attention}.{name}" for name in self.attention_projections]
        linears = {name for name, module in layer.named_modules() if is_linear(module)}
        return linears.issuperset(names)


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's text part; most models are nothing else."""
    return model.config.get_text_config()  # pyright: ignore


def keeps_running_states(config: Any) -> bool:
    """Whether some layers keep one state of all tokens before, in place of keys and values."""
    caches = (_CACHES.get(kind, object) for kind in getattr(config, "layer_types", None) or ())
    return any(issubclass(cache, LinearAttentionCacheLayerMixin) for cache in caches)


def base_layers(model: nn.Module, family: Family) -> list[BaseLayer]:
    hidden_size = text_config(model).hidden_size
    layers = []
    for index, layer in enumerate(model.get_submodule(family.layers).children()):
        names = family.attention_projections if family.has_attention(layer) else ()
        attention = _projections(layer, index, family.attention, names)
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
        linear, key = layer.get_submodule(f"{block}.{name}"), f"layers.{index}.{block}.{name}"
        projections[name] = BaseProjection(linear, key, quantised_weight(linear))
    return projections


def _shapes(layers: Sequence[BaseLayer]) -> dict[str, tuple[int, int]]:
    return {
        f"{block}.{name}": (projection.out_features, projection.in_features)
        for layer in layers
        for block, projections in layer.blocks.items()
        for name, projection in projections.items()
    }


def head_of(model: nn.Module, family: Family) -> Callable[..., Tensor]:
    """Return the function from final hidden states, maybe by another linear layer, to logits."""
    linear = model.get_output_embeddings()  # pyright: ignore
    divisor, factor, softcap = family.logit_divisor, family.logit_factor, family.logit_softcap

    def head(hidden_states: Tensor, linear: Callable[[Tensor], Tensor] = linear) -> Tensor:
        logits = linear(hidden_states)
        logits = logits if divisor is None else logits / divisor
        logits = logits if factor is None else logits * factor
        return logits if softcap is None else torch.tanh(logits / softcap) * softcap

    return head


def base_info(model: nn.Module, family: Family, layers: list[BaseLayer]) -> BaseInfo:
    """Describe a base model for the files of its adapters."""
    config: Any = model.config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # pyright: ignore
    shapes, text = _shapes(layers), text_config(model)
    with_attention = tuple(layer.index for layer in layers if layer.attention)
    projections = [projection for layer in layers for projection in layer.projections]
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
        fingerprint=fingerprint(model, shapes, layers),
        first_fingerprint=first_fingerprint(model, shapes, layers),
        quantization=next(kinds, None),  # of the first; some may be left in floating point
        modules=_other_modules(model, family),
        embedding=paths[id(embedding)],
        head=paths[id(head)],
        ties_head=embedding.weight is head.weight,
        attention_layers=with_attention if len(with_attention) < len(layers) else None,
        has_own_names=others.isdisjoint(projection.name for projection in projections),
    )


def _other_modules(model: nn.Module, family: Family) -> dict[str, dict[str, tuple[int, ...]]]:
    """Find embeddings, norms of the text model and the head, with their parameters' shapes."""
    text_model = family.layers.rpartition(".")[0]
    activation = f".{family.ffn}.{family.activation}"
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # pyright: ignore
    found = {}
    for path, module in model.named_modules():
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        is_norm = (
            path.startswith(f"{text_model}.")
            and not any(module.children())
            and all(len(shape) == 1 for shape in shapes.values())
            # A gated norm takes its gate too.
            and len(signature(type(module).forward).parameters) == 2
            and not path.endswith(activation)
        )
        if shapes and (module in tables or is_norm):
            found[path] = shapes
    return found
