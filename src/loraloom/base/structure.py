"""A transformers model, read once: where its decoder layers are, and what their blocks are made of.

Axes: N states, D hidden, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING as _CACHES
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from loraloom.base import families
from loraloom.base.blocks import (
    BaseInfo,
    BaseLayer,
    BaseProjection,
    Block,
    BlockInfo,
    BlockKind,
    BlockProjection,
    InputGroups,
    QuantizedWeight,
    StackedProjection,
    describe_blocks,
)
from loraloom.base.fingerprint import fingerprint
from loraloom.base.quantization import (
    check_computes,
    is_linear,
    num_parameters,
    quantized_weight,
    quantized_weights,
)
from loraloom.errors import ModelError, shown
from loraloom.ops.gating import ActivationGating

# From states after the final norm to logits, [N, V], scaled and soft-capped.
Head = Callable[..., Tensor]


@dataclass(frozen=True)
class Structure:
    """What a base model is made of, as far as adapters are concerned."""

    info: BaseInfo
    layers: Sequence[BaseLayer]
    head: Head  # from final hidden states, maybe by another linear layer, to logits
    quantized: Sequence[QuantizedWeight]  # of all its linear layers and stacks


def read_structure(model: nn.Module) -> Structure:
    """Read a causal LM's decoder layers, their blocks and its head.

    Raises:
        ModelError: If it is compiled, no causal LM, built in a way that is not known, or quantized
            so that this machine computes it wrongly.
    """
    layers_path = find_layers(model)
    modules = list(model.get_submodule(layers_path).children())
    attention_path, groups = _find_attention(model, modules)
    layers = [
        _LayerReader(model, module, index, f"{layers_path}.{index}").read(attention_path, groups)
        for index, module in enumerate(modules)
    ]
    quantized = quantized_weights(model)
    check_computes(quantized)
    weights = [*quantized.values()]
    head = _head(model)
    return Structure(_describe(model, layers_path, layers, weights), layers, head, weights)


def find_layers(model: nn.Module) -> str:
    """Return the path of a causal LM's list of decoder layers, not of an encoder of images."""
    is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
    if is_compiled or hasattr(model, "_orig_mod"):
        raise ModelError("model must not be compiled; attach the uncompiled model")
    find_head = getattr(model, "get_output_embeddings", None)
    if find_head is None or find_head() is None:  # a classifier has other heads
        raise unsupported(model, "it has no head with logits of tokens")
    if getattr(model.config, "is_encoder_decoder", False):
        raise unsupported(model, "it has an encoder")
    num_layers = getattr(text_config(model), "num_hidden_layers", None)
    inside = {id(module) for module in model.get_decoder().modules()}
    for path, module in model.named_modules():
        if id(module) not in inside or not isinstance(module, nn.ModuleList):
            continue
        if len(module) == num_layers:
            return path
    raise unsupported(model, f"no list of its modules has its {num_layers} decoder layers")


def unsupported(model: nn.Module, reason: str) -> ModelError:
    linears = sorted({name.rpartition(".")[2] for name, m in model.named_modules() if is_linear(m)})
    return ModelError(
        f"model family must be one of {', '.join(families.FAMILIES)}, or one that is built and "
        "computes like them (as a causal LM), got "
        f"{shown(_model_type(model))} ({type(model).__name__}): "
        f"{reason}; its linear modules are {', '.join(linears) or 'none'}"
    )


def text_config(model: nn.Module) -> Any:
    """Return the configuration of a model's text part; most models are nothing else."""
    return model.config.get_text_config()  # ty: ignore[missing-union-attribute, not-callable]


def max_positions(config: Any) -> int:
    """The length to which rows are decoded: of LongRoPE, beyond which earlier keys change."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return rope["original_max_position_embeddings"]
    return config.max_position_embeddings


def keeps_running_states(config: Any) -> bool:
    """Whether some layers keep one state of all tokens before, in place of keys and values."""
    kinds = getattr(config, "layer_types", None) or ()
    caches = [_CACHES.get(kind, object) for kind in kinds]
    return any(issubclass(cache, LinearAttentionCacheLayerMixin) for cache in caches)


def _model_type(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "model_type", type(model).__name__)


def _linears(module: nn.Module) -> set[str]:
    return {name for name, child in module.named_children() if is_linear(child)}


def _find_attention(model: nn.Module, layers: Iterable[nn.Module]) -> tuple[str, InputGroups]:
    kinds = list[tuple[str, InputGroups]]()
    for layer in layers:
        for path, child in layer.named_children():
            linears = _linears(child)
            for inputs, output in product(families.ATTENTION_INPUTS, families.ATTENTION_OUTPUTS):
                groups = (*inputs, (output,))
                if linears.issuperset(chain.from_iterable(groups)):
                    kinds.append((path, groups))
    if not kinds:
        raise unsupported(model, "no layer has attention with projections of q, k, v and output")
    # Linear attention, which may have such projections too, comes last.
    return min(kinds, key=lambda kind: "linear" in kind[0])


@dataclass(frozen=True)
class _LayerReader:
    """Reads the blocks of a decoder layer."""

    model: nn.Module
    layer: nn.Module
    index: int
    path: str  # of the layer in the model

    def read(self, attention_path: str, groups: InputGroups) -> BaseLayer:
        names = tuple(chain.from_iterable(groups))
        blocks = []
        child = dict(self.layer.named_children()).get(attention_path)
        if child is not None and _linears(child).issuperset(names):
            linears = self._linears(attention_path, names)
            blocks.append(self._block(attention_path, "attention", groups, linears))
        blocks += self._other_blocks()
        return BaseLayer(self.index, self.path, tuple(blocks), self.hidden_size)

    @property
    def hidden_size(self) -> int:
        return text_config(self.model).hidden_size

    def _other_blocks(self) -> list[Block]:
        """Find the FFN blocks, or the mixture of experts and what is in it."""
        blocks = []
        for path, child in self.layer.named_children():
            block = self._gated_block(path)
            if block is not None:  # gemma4's experts stand in the layer
                blocks.append(block)
            elif "att" not in path and any(_has_stacks(module) for module in child.modules()):
                # its experts, and perhaps one that all tokens share
                inside = [self._gated_block(f"{path}.{name}") for name, _ in child.named_children()]
                blocks += [block for block in inside if block is not None]
                whole = BlockProjection(child, self._key(path, "moe"), self.hidden_size)
                if not any(block.kind == "experts" for block in blocks):
                    closed = next(module for module in child.modules() if _has_stacks(module))
                    whole.closed_experts = type(closed).__name__
                blocks.append(self._block(path, "moe", (("moe",),), {"moe": whole}))
        if not blocks:
            raise unsupported(
                self.model,
                "its layers have no module with the FFN block's projections, gate, up and down",
            )
        return blocks

    def _gated_block(self, path: str) -> Block | None:
        """Read an FFN block or stacked experts; None if it is neither."""
        module: Any = self.layer.get_submodule(path)
        linears = _linears(module)
        for groups in families.FFNS:
            names = tuple(chain.from_iterable(groups))
            if linears.issuperset(names):
                activation = _activation(self.model, module, names)
                gating = ActivationGating(activation, is_fused=families.FUSED in names)
                return self._block(path, "ffn", groups, self._linears(path, names), gating)
        names = _stacked_names(module)
        if names is None:
            return None
        stacks = {}
        for name in names:
            quantized = _quantized_stack(module, name)
            stacks[name] = StackedProjection(module, name, self._key(path, name), quantized)
        groups = tuple((name,) for name in names)
        gating = module._apply_gate if module.has_gate else module.act_fn
        return self._block(path, "experts", groups, stacks, gating)

    def _block(
        self,
        path: str,
        kind: BlockKind,
        groups: InputGroups,
        projections: Mapping[str, BaseProjection],
        gating: Any = None,
    ) -> Block:
        return Block(
            layer=self.index,
            path=path,
            kind=kind,
            groups=groups,
            projections=projections,
            hidden_size=self.hidden_size,
            gating=gating,
            experts_per_token=self._experts_per_token() if kind == "experts" else None,
        )

    def _experts_per_token(self) -> int | None:
        config = text_config(self.model)
        for field in families.EXPERTS_PER_TOKEN:
            count = getattr(config, field, None)
            if isinstance(count, int):
                return count
        return None

    def _linears(self, path: str, names: Iterable[str]) -> dict[str, BaseProjection]:
        projections = {}
        for name in names:
            linear = self.layer.get_submodule(f"{path}.{name}")
            key = self._key(path, name)
            projections[name] = BaseProjection(linear, key, quantized_weight(linear))
        return projections

    def _key(self, path: str, name: str) -> str:
        return f"layers.{self.index}.{path}.{name}"


def expert_modules(model: nn.Module, info: BaseInfo) -> Iterator[tuple[int, BlockInfo, nn.Module]]:
    """Yield the modules of stacked experts with the index of their layer and what they are."""
    for block in info.blocks:
        if block.kind == "experts":
            for layer in block.layers:
                path = f"{info.layers_path}.{layer}.{block.path}"
                yield layer, block, model.get_submodule(path)


def _has_stacks(module: nn.Module) -> bool:
    """Whether weights of several experts are one tensor."""
    if isinstance(module, nn.Conv1d):
        return False
    # Quantized ones are parametrized, or tensors of a kernel's library.
    if "parametrizations" in module._modules or "down_proj" in vars(module):
        return hasattr(module, "num_experts")
    return any(weight.dim() == 3 for weight in module.parameters(recurse=False))


def _quantized_stack(experts: Any, parameter: str) -> QuantizedWeight | None:
    stacks = getattr(experts, "parametrizations", {})
    return quantized_weight(stacks[parameter]) if parameter in stacks else None


def _stacked_names(module: Any) -> tuple[str, str] | None:
    """Name the stacks of a module that takes states, tokens' experts and their weights; else None.

    Source: transformers 5.24, `integrations/moe.py` (`use_experts_implementation`).
    """
    if not _has_stacks(module) or getattr(module, "has_post_expert_norm", True):
        return None
    names = ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
    for name in names:
        if name not in module._parameters and _quantized_stack(module, name) is None:
            return None
    return names


def _activation(model: nn.Module, ffn: nn.Module, names: Collection[str]) -> Any:
    function = families.ACTIVATION_FUNCTIONS.get(_model_type(model))
    if function is not None:
        return ACT2FN[function]
    named = [name for name in families.ACTIVATIONS if callable(getattr(ffn, name, None))]
    others = [name for name, _ in ffn.named_children() if name not in names]
    if not named and len(others) != 1:
        raise unsupported(model, "its FFN block has no module that is its activation")
    return getattr(ffn, named[0] if named else others[0])


def _head(model: nn.Module) -> Head:
    config = text_config(model)
    fields = families.LOGIT_FIELDS | families.LOGIT_EXCEPTIONS.get(_model_type(model), {})
    divisor = getattr(config, fields["divisor"], None)
    factor = getattr(config, fields["factor"], None)
    softcap = getattr(config, fields["softcap"], None)
    head_linear = model.get_output_embeddings()  # ty: ignore[not-callable]

    def head(hidden_states: Tensor, linear: Callable[[Tensor], Tensor] = head_linear) -> Tensor:
        logits = linear(hidden_states)
        if divisor:
            logits = logits / divisor
        if factor:
            logits = logits * factor
        return torch.tanh(logits / softcap) * softcap if softcap else logits

    return head


def _describe(
    model: nn.Module,
    layers_path: str,
    layers: Sequence[BaseLayer],
    quantized: Sequence[QuantizedWeight],
) -> BaseInfo:
    config: Any = model.config
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # ty: ignore[not-callable]
    blocks = describe_blocks(layers)
    modules = _other_modules(model, layers_path, layers)
    projections = [projection for layer in layers for projection in layer.projections]
    kinds = [base.quantized.kind for base in projections if base.quantized is not None]
    paths = {id(module): path for path, module in model.named_modules()}
    return BaseInfo(
        name_or_path=getattr(config, "_name_or_path", ""),
        model_type=config.model_type,
        layers_path=layers_path,
        blocks=blocks,
        activation=_name_of_activation(model),
        num_layers=len(layers),
        hidden_size=layers[0].hidden_size,
        num_parameters=num_parameters(model, quantized),
        fingerprint=fingerprint(model, blocks, len(layers), quantized),
        # of the first; some may be left in floating point
        quantization=kinds[0] if kinds else None,
        modules=modules,
        embedding=paths[id(embedding)],
        head=paths[id(head)],
        ties_head=embedding.weight is head.weight,
        module_paths=tuple(path for path in paths.values() if path),
        parameter_paths=tuple(name for name, _ in model.named_parameters()),
    )


def _name_of_activation(model: nn.Module) -> str:
    config = text_config(model)
    for field in ("hidden_act", "hidden_activation"):
        name = getattr(config, field, None)
        if isinstance(name, str):
            return name
    return families.ACTIVATION_FUNCTIONS.get(_model_type(model), "")


def _other_modules(
    model: nn.Module, layers_path: str, layers: Sequence[BaseLayer]
) -> dict[str, dict[str, tuple[int, ...]]]:
    """Find embeddings, norms of the text model and the head, with their parameters' shapes."""
    text_model = layers_path.rpartition(".")[0]
    gatings = [block.gating for layer in layers for block in layer.blocks]
    activations = {id(gating.act) for gating in gatings if isinstance(gating, ActivationGating)}
    tables = (model.get_input_embeddings(), model.get_output_embeddings())  # ty: ignore[not-callable]
    modules = {}
    for path, module in model.named_modules():
        parameters = module.named_parameters(recurse=False)
        shapes = {name: tuple(parameter.shape) for name, parameter in parameters}
        is_norm = (
            path.startswith(f"{text_model}.")
            and not any(module.children())
            and all(len(shape) == 1 for shape in shapes.values())
            # A gated norm takes its gate too.
            and len(signature(type(module).forward).parameters) == 2
            and id(module) not in activations
        )
        if shapes and (module in tables or is_norm):
            modules[path] = shapes
    return modules
