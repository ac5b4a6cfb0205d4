"""A base model and an adapter on it as one model, written layer by layer and read back.

Axes: O out_features, I in_features.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from loraloom.adapters.method import Adapter, Projection
from loraloom.adapters.own import own_parts
from loraloom.errors import AdapterError
from loraloom.formats.checkpoint import LazyTensor, read_index
from loraloom.formats.moe import STORED, Place, twin_of
from loraloom.models.host import Host
from loraloom.models.merging import check_merges
from loraloom.models.quantised import quantised_linears


class WholeModel(ABC):
    """What a checkpoint says: a configuration and tensors, quantised weights in floating point."""

    config: Any
    """In transformers' class."""

    def __init__(self, host: Host, adapter: Adapter):
        self.host = host
        self.adapter = adapter
        self.dtype = torch.promote_types(host.dtype, torch.float32)

    @abstractmethod
    def layer_tensors(self, index: int, layer: nn.Module) -> Iterator[tuple[str, LazyTensor]]:
        """Give a decoder layer's tensors by their names in the layer."""

    def layer_parts(self, name: str, shape: torch.Size) -> dict[str, Place]:
        """Say of which stored tensors a loaded layer's tensor is made, and their places in it."""
        return {name: ()}

    @abstractmethod
    def empty(self) -> PreTrainedModel:
        """Make a model of the class, in float32, whose weights are to come."""

    @property
    def architecture(self) -> str:
        """The class of transformers."""
        return self.config.architectures[0]

    @property
    def num_shards(self) -> int:
        """One for each decoder layer, and one for the rest."""
        return self.host.base.num_layers + 1

    def shards(self) -> Iterator[Mapping[str, LazyTensor]]:
        """Give the model's tensors by name, layer by layer."""
        yield {name: self._owned(name, tensor) for name, tensor in self._outer_tensors()}
        layers = self.host.model.get_submodule(self.host.base.layers_path)
        for index, layer in enumerate(layers.children()):
            prefix = f"{self.host.base.layers_path}.{index}"
            tensors = self.layer_tensors(index, layer)
            names = ((f"{prefix}.{name}", tensor) for name, tensor in tensors)
            yield {name: self._owned(name, tensor) for name, tensor in names}

    def _outer_tensors(self) -> Iterator[tuple[str, LazyTensor]]:
        """Embeddings, the last norm and the head, unless it is the embeddings."""
        model, layers = self.host.model, f"{self.host.base.layers_path}."
        tied = {} if self.unties_head else model.all_tied_weights_keys
        for name, tensor in whole_tensors(model).items():
            if not name.startswith(layers) and name not in tied:
                yield name, tensor

    @property
    def unties_head(self) -> bool:
        """Whether the adapter has an embedding or head of its own, and not both as one."""
        base = self.host.base
        has_own = any(self.adapter.own_at(path) is not None for path in (base.embedding, base.head))
        return base.ties_head and has_own and not own_parts(self.adapter.config, base).tied

    def _owned(self, name: str, tensor: LazyTensor) -> LazyTensor:
        """Put what the adapter has as its own in place of a module's parameter."""
        path, _, kind = name.rpartition(".")
        own = self.adapter.own_at(path)
        if own is None:
            return tensor
        return LazyTensor(tensor.shape, lambda: own.stored(kind, tensor.make()))

    def merged(
        self, projections: Mapping[str, Projection], name: str, tensor: LazyTensor
    ) -> LazyTensor:
        """Merge the update into a tensor if it is an adapted projection's weight."""
        path, _, kind = name.rpartition(".")
        if kind != "weight" or path not in projections:
            return tensor
        projection = projections[path]
        return LazyTensor(tensor.shape, lambda: projection.merged(self.dtype))

    def attention(self, index: int) -> dict[str, Projection]:
        """The adapter's projections of a layer's attention, by their names in the layer."""
        return {p.path: p for p in self.adapter.attention_block(index).values()}

    def ffn(self, index: int) -> dict[str, Projection]:
        """The adapter's projections of a layer's FFN block, by their names in the layer."""
        return {p.path: p for p in self.adapter.ffn_block(index).values()}


def whole_tensors(module: nn.Module) -> dict[str, LazyTensor]:
    """A module's tensors by name; weights that are quantised are dequantised when wanted."""
    tensors = {name: LazyTensor.of(tensor) for name, tensor in module.state_dict().items()}
    for path, weight in quantised_linears(module).items():
        kept = [name for name in tensors if name.startswith(f"{path}.") and name != f"{path}.bias"]
        for name in kept:
            del tensors[name]
        shape = (weight.linear.out_features, weight.linear.in_features)
        tensors[f"{path}.weight"] = LazyTensor(shape, weight.whole)
    return tensors


class MergedModel(WholeModel):
    """The base model with an adapter's updates in its weights."""

    def __init__(self, host: Host, adapter: Adapter):
        super().__init__(host, adapter)
        check_merges(adapter)
        self.config = copy.deepcopy(host.model.config)
        self.config.architectures = [type(host.model).__name__]
        for name in ("quantization_config", "auto_map"):
            if hasattr(self.config, name):
                delattr(self.config, name)
        self._stored = STORED.get(host.base.model_type)
        if self.unties_head:
            self.config.tie_word_embeddings = False

    def empty(self) -> PreTrainedModel:
        """See WholeModel."""
        return type(self.host.model)._from_config(self.config, dtype=torch.float32)

    def layer_tensors(self, index: int, layer: nn.Module) -> Iterator[tuple[str, LazyTensor]]:
        """See WholeModel."""
        projections = self.attention(index) | self.ffn(index)
        for name, tensor in whole_tensors(layer).items():
            whole = self.merged(projections, name, tensor)
            for stored, place in self.layer_parts(name, torch.Size(whole.shape)).items():
                yield stored, whole.part(place)

    def layer_parts(self, name: str, shape: torch.Size) -> dict[str, Place]:
        """See WholeModel."""
        return {name: ()} if self._stored is None else self._stored.stored_parts(name, shape)


class MoeModel(WholeModel):
    """A mixture as a model of the mixture-of-experts class that computes the same."""

    def __init__(self, host: Host, adapter: Adapter):
        super().__init__(host, adapter)
        self.twin = twin_of(host.base.model_type)
        fields = self.twin.config_fields(host.config.to_dict(), adapter.as_moe(0))
        if self.unties_head:
            fields["tie_word_embeddings"] = False
        self.config = AutoConfig.for_model(self.twin.model_type, **fields)
        with torch.device("meta"):
            self._theirs = AutoModelForCausalLM.from_config(self.config)
        self.config.architectures = [type(self._theirs).__name__]
        self._check_tensors()

    def empty(self) -> PreTrainedModel:
        """See WholeModel."""
        return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)

    def layer_tensors(self, index: int, layer: nn.Module) -> Iterator[tuple[str, LazyTensor]]:
        """See WholeModel."""
        base = self.host.base
        attention = self.attention(index)
        for name, tensor in whole_tensors(layer).items():
            if not name.startswith(f"{base.ffn}."):
                whole = self.merged(attention, name, tensor)
                yield from self.twin.rename(name, whole, self.host.config)
        ffn = self.adapter.as_moe(index)
        shapes = {name: base.shapes[f"{base.ffn}.{name}"] for name in base.ffn_projections}
        for name, tensor in self.twin.ffn_tensors(ffn, shapes, self.dtype):
            yield f"{self.twin.block}.{name}", tensor

    def layer_parts(self, name: str, shape: torch.Size) -> dict[str, Place]:
        """See WholeModel."""
        return self.twin.stored_parts(name, shape)

    def _check_tensors(self) -> None:
        """Compare what surrounds the FFN blocks with what the class has there."""
        layers = f"{self.host.base.layers_path}.0"
        ours = whole_tensors(self.host.model.get_submodule(layers))
        biased = [name for name in ours if name.startswith(self.host.base.ffn) and "bias" in name]
        names = {
            new
            for name, tensor in ours.items()
            if not name.startswith(f"{self.host.base.ffn}.")
            for new, _ in self.twin.rename(name, tensor, self.host.config)
        }
        theirs = {
            name
            for name in self._theirs.get_submodule(layers).state_dict()
            if not name.startswith(f"{self.twin.loaded_block}.")
        }
        odd = sorted([*biased, *(names ^ theirs)])
        kinds = set(getattr(self.host.config, "layer_types", None) or [])
        rope = getattr(self.host.config, "rope_parameters", None) or {}
        if self.twin.splits_qkv and rope.get("partial_rotary_factor", 1.0) != 1.0:
            odd.append("heads that are rotated in part")
        if not self.twin.keeps_layer_types and "sliding_attention" in kinds:
            odd.append("layers with sliding attention")
        if odd:
            raise AdapterError(
                f"a mixture on this {self.host.base.model_type} can't be a "
                f"{self.architecture}: only one of them has {', '.join(odd)}; "
                "serve the mixture with loraloom instead"
            )


_BLOCK_NUMBERS = 1 << 22
"""Numbers of a head that are read at a time."""


def streamed_model(whole: WholeModel, directory: Path) -> PreTrainedModel:
    """Make a model that reads each module's weights when it runs, and then lets them go."""
    files = {name: directory / file for name, file in read_index(directory).items()}
    with init_empty_weights(include_buffers=False):
        model = whole.empty().eval()
    layers_path = whole.host.base.layers_path
    for index, layer in enumerate(model.get_submodule(layers_path).children()):
        read = partial(_read, files, f"{layers_path}.{index}.", whole.layer_parts)
        _read_when_run(layer, read)
    for path, module in model.named_modules():
        if path.startswith(f"{layers_path}.") or not list(module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Linear):
            weight = model.all_tied_weights_keys.get(f"{path}.weight", f"{path}.weight")
            module.forward = partial(_product, files, module, weight, f"{path}.bias")
        else:
            _read_when_run(module, partial(_read, files, f"{path}.", None))
    return model


def _product(
    files: dict[str, Path], module: nn.Linear, weight: str, bias: str, input: Tensor
) -> Tensor:
    step = max(1, _BLOCK_NUMBERS // module.in_features)
    outputs = []
    for start in range(0, module.out_features, step):
        with safe_open(files[weight], framework="pt") as shard:  # anew: what it reads, it keeps
            rows = shard.get_slice(weight)[start : start + step]
        outputs.append(linear(input, rows.float()))
    output = torch.cat(outputs, -1)
    return output if module.bias is None else output + _stored(files, bias).float()


def _read_when_run(module: nn.Module, read: Callable[[str, Tensor], Tensor]) -> None:
    shapes = module.state_dict()

    def enter(*_: Any) -> None:
        tensors = {name: read(name, empty) for name, empty in shapes.items()}
        module.load_state_dict(tensors, assign=True)

    def leave(*_: Any) -> None:
        module.load_state_dict(shapes, assign=True)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


def _read(
    files: dict[str, Path],
    prefix: str,
    parts_of: Callable[..., Any] | None,
    name: str,
    empty: Tensor,
) -> Tensor:
    """Put a tensor together from its parts in the files, in float32."""
    parts = {name: ()} if parts_of is None else parts_of(name, empty.shape)
    if len(parts) == 1:
        return _stored(files, prefix + next(iter(parts))).float().view(empty.shape)
    value = torch.empty_like(empty, dtype=torch.float32, device="cpu")
    for stored, place in parts.items():
        value[place] = _stored(files, prefix + stored)
    return value


def _stored(files: dict[str, Path], name: str) -> Tensor:
    with safe_open(files[name], framework="pt") as shard:
        return shard.get_tensor(name)
