"""A base model as adapters see it: decoder layers, each a list of blocks with projections.

Axes: T tokens, I in_features, O out_features, F feed-forward, E experts of the base model,
S columns of an A product, R rank.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraloom.distributed import copy_into, gather, own_part
from loraloom.errors import AdapterError

BlockKind = Literal["attention", "ffn", "experts", "moe"]
# What adapters can target by a kind's name.
BLOCK_KINDS: tuple[BlockKind, ...] = get_args(BlockKind)
# Names of a block's projections, grouped by the tensor that they read, in the order of computing.
InputGroups = tuple[tuple[str, ...], ...]


# What fingerprints begin with; those of version 0.1.0 have another form.
FINGERPRINT_FORM = "v2-"


@dataclass(frozen=True)
class QuantizedWeight:
    """W of a linear layer, or of a stack of experts, as a library keeps it, in fewer bits."""

    linear: Any  # the layer; of a stack, the module through which torch reads the parameter
    kind: str
    read: Callable[[Any], Tensor]  # from that to W in floating point, as the base model stores it

    def dequantized(self) -> Tensor:
        return self.read(self.linear)


class BaseProjection:
    """A frozen linear layer of the base model, with what DoRA needs to know of it."""

    num_experts: int | None = None
    """Of those whose weights are one tensor; None for a single weight."""
    has_weight = True  # False for a whole block, which is seen as a map of its input
    closed_experts: str | None = None
    """In a whole block, the class of experts whose weights can't be read."""
    quantized: QuantizedWeight | None = None
    _squared_norms: tuple[Hashable, Tensor] | None = None

    def __init__(self, linear: Any, key: str, quantized: QuantizedWeight | None = None):
        self.linear: nn.Module = linear
        self.key = key
        self.in_features: int = linear.in_features
        self.out_features: int = linear.out_features
        self.quantized = quantized

    @property
    def stored(self) -> Any:
        """The parameter, of which a process may have a part."""
        return self.linear.weight

    @property
    def weight(self) -> Tensor:
        """W, [O, I]: the base's own, put together where it is sharded, or a dequantized copy."""
        if self.quantized is not None:
            return self.quantized.dequantized()
        return gather(self.stored)

    def check_can_be_changed(self) -> None:
        """Raise an AdapterError if the base stores the weight quantized, or only a part of it."""
        if self.quantized is not None:
            raise AdapterError(
                f"merging changes the base's weights, which must be floating-point numbers, got "
                f"{self.key} in {self.quantized.kind}; load the base model without quantization, "
                "or let `loraloom export` write the merged model"
            )
        if own_part(self.stored) is not self.stored:
            raise AdapterError(
                f"merging requires the whole base model in each process, got a part of {self.key}; "
                "load the base model without sharding"
            )

    @property
    def stored_name(self) -> str:
        return f"{self.key.split('.', 2)[2]}.weight"

    def as_stored(self, weight: Tensor) -> Tensor:
        """Lay W out as the base model stores it."""
        return weight

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Put other values into W, rounded to its dtype."""
        copy_into(self.stored, self.as_stored(weight))

    @torch.no_grad()
    def product(
        self, lora_A: Float[Tensor, "*E S I"], experts: Tensor | None = None
    ) -> Float[Tensor, "*E O S"]:
        """Compute W Aᵀ in W's dtype; of all experts or of some, where there are several."""
        weight = self.weight if experts is None else self.weight[experts]
        return weight @ lora_A.mT.to(weight.dtype)

    def compute_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The layer's bias in the dtype of its output, [O]."""
        bias: Any = self.linear.bias
        return None if bias is None else bias.to(dtype)

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def device(self) -> torch.device:
        return next(chain(self.linear.parameters(), self.linear.buffers())).device

    @property
    def squared_norms(self) -> Tensor:
        """‖W‖² of each output row, in float32 or better; computed once for W as it is."""
        state = self._weight_state()
        if self._squared_norms is not None and self._squared_norms[0] == state:
            return self._squared_norms[1]
        weight = self.weight.detach()
        # In bfloat16 a sum of thousands of squares would keep two digits.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if weight.dim() == 2:
            norms = weight.to(dtype).square().sum(1)
        else:  # one expert is wide at a time
            norms = torch.stack([expert.to(dtype).square().sum(1) for expert in weight])
        self._squared_norms = state, norms
        return norms

    def _weight_state(self) -> Hashable:
        """Return what differs once W has changed: by `load_state_dict`, or by anything in place."""
        if self.quantized is not None:  # which nothing changes; reading a stack dequantizes it
            return self.device
        stored = self.stored
        version = 0 if stored.is_inference() else stored._version
        return self.device, id(stored), version


class StackedProjection(BaseProjection):
    """A projection of all experts of a mixture: a parameter of three axes in their module."""

    def __init__(
        self, experts: Any, parameter: str, key: str, quantized: QuantizedWeight | None = None
    ):
        self.linear = experts
        self.key = key
        self.quantized = quantized
        self.parameter = parameter
        self.is_transposed = bool(getattr(experts, "is_transposed", False))
        self.num_experts, self.out_features, self.in_features = self.weight.shape

    @property
    def stored(self) -> Any:
        return getattr(self.linear, self.parameter)

    @property
    def weight(self) -> Tensor:
        """W of all experts, [E, O, I]."""
        weight = super().weight
        return weight.transpose(1, 2) if self.is_transposed else weight

    @property
    def stored_name(self) -> str:
        return self.key.split(".", 2)[2]

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).contiguous() if self.is_transposed else weight

    def compute_bias(self, dtype: torch.dtype) -> Tensor | None:
        """The biases of all experts, [E, O]."""
        bias: Any = getattr(self.linear, f"{self.parameter}_bias", None)
        return None if bias is None else bias.to(dtype)


def is_stack(model: nn.Module, name: str) -> bool:
    """Whether a parameter has the weights of several experts, in transformers' common form."""
    path, _, parameter = name.rpartition(".")
    module = model.get_submodule(path)
    stored = module._parameters.get(parameter)
    return stored is not None and stored.dim() == 3 and hasattr(module, "is_transposed")


class BlockProjection(BaseProjection):
    """A whole block as a map from hidden states to hidden states: it has no W."""

    has_weight = False

    def __init__(self, module: Any, key: str, hidden_size: int):
        self.linear = module
        self.key = key
        self.in_features = self.out_features = hidden_size

    @property
    def weight(self) -> Tensor:
        raise AdapterError(f"{self.key} is a whole block, which has no weight to change")

    def check_can_be_changed(self) -> None:
        raise AdapterError(
            f"an update of {self.key} is computed beside a whole block and cannot be merged; "
            "serve the adapter as it is"
        )

    def compute_bias(self, dtype: torch.dtype) -> Tensor | None:
        return None


@dataclass(frozen=True, eq=False)
class Block:
    """A module of a decoder layer whose projections adapters change."""

    layer: int  # index of the decoder layer
    path: str  # the module's path in the layer: `self_attn`, `mlp`
    kind: BlockKind
    groups: InputGroups
    projections: Mapping[str, BaseProjection]  # by their names in the block
    hidden_size: int  # features of what enters the block, D
    gating: Any = None
    """A `Gating`, from the outputs of the first group to what the second one, of one projection,
    reads; None where other things lie between the groups, as in attention."""
    experts_per_token: int | None = None
    """How many of a mixture's experts compute a token, as the base model's config says."""

    @property
    def module_name(self) -> str:
        """The path as a name that torch's containers of modules accept."""
        return self.path.replace(".", "_")

    @property
    def num_experts(self) -> int | None:
        """Experts whose weights are one tensor; None in blocks that aren't such a mixture."""
        return self.output.num_experts

    @property
    def is_feed_forward(self) -> bool:
        """Whether it is an FFN block or a mixture of them, where methods have their experts."""
        return self.gating is not None or not self.output.has_weight

    @property
    def is_dense(self) -> bool:
        """Whether it is an FFN block of single projections, with a gating between them."""
        return self.gating is not None and self.num_experts is None

    def names_of(self, keys: Collection[str]) -> list[str]:
        """Return the names of those projections whose keys are among others."""
        return [name for name, base in self.projections.items() if base.key in keys]

    @property
    def output(self) -> BaseProjection:
        return self.projections[self.groups[-1][-1]]

    @property
    def device(self) -> torch.device:
        return next(iter(self.projections.values())).device


@dataclass(frozen=True)
class BaseLayer:
    """One decoder layer, as an adapter sees it; blocks may differ from layer to layer."""

    index: int
    path: str  # in the base model: `model.layers.3`, for instance
    blocks: tuple[Block, ...]
    hidden_size: int

    @property
    def projections(self) -> list[BaseProjection]:
        return [base for block in self.blocks for base in block.projections.values()]


@dataclass(frozen=True)
class BlockInfo:
    """A block that some decoder layers have, without its weights."""

    path: str
    kind: BlockKind
    groups: InputGroups
    shapes: Mapping[str, tuple[int, ...]]
    """(out_features, in_features) of each projection, behind the number of stacked experts."""
    layers: tuple[int, ...]  # indices of the decoder layers that have it
    experts_per_token: int | None = None

    def without_weights(
        self, layer: int, modules: Mapping[str, nn.Module], hidden_size: int
    ) -> Block:
        """Describe it in a layer, with modules on the meta device."""
        projections: dict[str, BaseProjection] = {}
        for name, module in modules.items():
            key = f"layers.{layer}.{self.path}.{name}"
            if self.kind == "experts":
                projections[name] = StackedProjection(module, "weight", key)
            elif self.kind == "moe":
                projections[name] = BlockProjection(module, key, hidden_size)
            else:
                projections[name] = BaseProjection(module, key)
        return Block(
            layer=layer,
            path=self.path,
            kind=self.kind,
            groups=self.groups,
            projections=projections,
            hidden_size=hidden_size,
            gating=_no_gating if self.kind in ("ffn", "experts") else None,
            experts_per_token=self.experts_per_token,
        )


def _no_gating(*outputs: Tensor) -> Tensor:
    raise NotImplementedError


def describe_blocks(layers: Sequence[BaseLayer]) -> tuple[BlockInfo, ...]:
    """Describe the blocks of all layers, equal ones once, in the order of the layers."""
    infos: dict[Any, BlockInfo] = {}
    for layer in layers:
        for block in layer.blocks:
            shapes = {}
            for name, base in block.projections.items():
                sizes = (base.num_experts, base.out_features, base.in_features)
                shapes[name] = tuple(size for size in sizes if size is not None)
            key = (block.path, block.kind, block.groups, tuple(shapes.items()))
            before = infos[key].layers if key in infos else ()
            infos[key] = BlockInfo(
                path=block.path,
                kind=block.kind,
                groups=block.groups,
                shapes=shapes,
                layers=(*before, layer.index),
                experts_per_token=block.experts_per_token,
            )
    return tuple(infos.values())


@dataclass(frozen=True)
class BaseInfo:
    """A base model, as adapters' files see it."""

    name_or_path: str
    model_type: str  # its family's name in transformers
    layers_path: str  # path of the decoder layers, `model.layers` for instance
    blocks: tuple[BlockInfo, ...]  # those of its decoder layers
    activation: str  # of the FFN, as the model's config names it
    num_layers: int
    hidden_size: int
    num_parameters: int
    fingerprint: str  # hash of the shapes and of some of each weight's numbers, rounded to bfloat16
    quantization: str | None = None
    """How its projections are kept, `bitsandbytes nf4` for instance; None: in floating point."""
    modules: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    """What adapters can have as their own: modules outside of the projections that have parameters,
    by path, and the parameters' shapes."""
    embedding: str = ""
    head: str = ""  # their paths: of the input and the output embeddings
    ties_head: bool = False  # whether the two have one weight
    module_paths: tuple[str, ...] = ()
    parameter_paths: tuple[str, ...] = ()
    """Paths of all modules and of all parameters, which names in PEFT's files may match."""

    def has_fingerprint(self, recorded: str | None) -> bool:
        """Whether a recorded fingerprint may be this model's; one of another form may."""
        if recorded is None or not recorded.startswith(FINGERPRINT_FORM):
            return recorded is not None
        return recorded == self.fingerprint

    def layers_without_weights(self) -> list[BaseLayer]:
        """Describe the projections on the meta device, where an adapter's shapes are read off."""
        layers: list[list[Block]] = [[] for _ in range(self.num_layers)]
        for info in self.blocks:
            # One module for all layers: thousands of projections would take seconds even on meta.
            modules = {}
            for name, shape in info.shapes.items():
                modules[name] = nn.Linear(shape[-1], shape[-2], bias=False, device="meta")
                modules[name].weight = nn.Parameter(torch.empty(shape, device="meta"))
            for layer in info.layers:
                layers[layer].append(info.without_weights(layer, modules, self.hidden_size))
        return [
            BaseLayer(index, f"{self.layers_path}.{index}", tuple(blocks), self.hidden_size)
            for index, blocks in enumerate(layers)
        ]
