"""The contract of a method: its settings, and the adapter that they make.

A method is a file beside this one with a subclass of `AdapterConfig`, whose `build` makes an
`Adapter`. Most methods differ in rank space alone: their `Projection` has an A, a B, perhaps a row
scale c, and something `between` the two, and `LowRankAdapter` does the rest (low_rank.py):

    y = c ∘ (Wx + between(A drop(x)) B) + b

`docs/add_a_method.md` adds a method step by step.

Axes: T tokens of one segment, D hidden, F feed-forward, P columns of the A product.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import cached_property, partial
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from loraloom.adapters.projection import OwnModule as OwnModule
from loraloom.adapters.projection import Projection as Projection
from loraloom.adapters.segment import MoeFfn, Records, Samples, SegmentTokens
from loraloom.adapters.tensor_names import Shape, Weights
from loraloom.base.blocks import BaseInfo, BaseLayer, BaseProjection, Block
from loraloom.base.targets import ALL_LINEAR, check_pattern, is_pattern, name_targets, select
from loraloom.config.data import PromptForm
from loraloom.config.fields import StrictModel
from loraloom.errors import AdapterError, shown
from loraloom.ops.dropout import Site
from loraloom.ops.expert_ffn import FfnDropout, FfnRows, FfnWeights, Routing
from loraloom.ops.expert_weights import ExpertWeights
from loraloom.ops.low_rank import InputGroup, down_project
from loraloom.ops.stacked import StackedFfn
from loraloom.routing.losses import AddUp, keep

# Bounds far from what anybody trains, so that a slip or malice ends in a message.
MAX_RANK = 2**16
MAX_NUMBER = 1e6

_ADJUSTABLE = "adjustable"
_Setting = TypeVar("_Setting")
# A setting that tensors tell, or that matters in training alone: `start_from` lets it differ.
Adjustable = Annotated[_Setting, _ADJUSTABLE]

TokenIds = tuple[Annotated[int, Field(ge=0)], ...]
TargetGroup = Literal["all-linear", "attention", "ffn", "experts", "moe"]
Targets = TargetGroup | str | tuple[str, ...]


class AdapterConfig(StrictModel, ABC):
    """The settings that all methods have, and the questions that all must answer."""

    peft_type: ClassVar[str]
    """What adapter_config.json calls the method."""
    title: ClassVar[str]
    """The method as papers spell it; a property where a setting makes a variant of it."""
    formula: ClassVar[str]
    """What an adapted projection computes, in a line."""
    package: ClassVar[str] = ""
    """Who has registered it, for those who lack it; empty: it is loraloom's."""
    layout: ClassVar[Literal["peft", "reference", "native"]] = "native"
    """How tensors are named on disk; see formats/."""
    aliases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Names that people give as `method` for settings of this one, and what to write instead."""
    adapts_stacks: ClassVar[bool] = False
    """Whether it can be on the experts of a base model, whose weights are one tensor."""
    needs_weights: ClassVar[bool] = False
    """Whether what it adapts must have a weight, which a whole block has not; or a property."""
    adds_up_over_ranks: ClassVar[bool] = True
    """Whether its auxiliary loss is known to a rank that has only a part of the tokens."""

    method: str
    rank: int = Field(default=16, ge=1, le=MAX_RANK)
    """Rank of the update."""
    dropout: Adjustable[float] = Field(default=0.0, ge=0, lt=1)
    """Dropout on the input of the update, in training only."""
    target_modules: Adjustable[Targets] = "all-linear"
    """Projections to adapt: kinds of blocks, or the last words of paths in the base model, such as
    `q_proj`, `shared_expert.down_proj` or `layers.3.mlp.up_proj`. `attention` and `ffn` are linear
    layers, both of them `all-linear`; where a base model is a mixture of experts, `experts` are its
    experts' projections, and `moe` is an update of its whole block's output. A string such as
    `.*\\.[qv]_proj` is a regular expression of whole paths, as in PEFT."""
    modules_to_save: Adjustable[tuple[str, ...]] = ()
    """Modules outside of the projections that the adapter trains whole, as a separate copy:
    `embed_tokens`, `lm_head`, norms; names or the ends of paths, in whole words."""
    trainable_token_indices: Adjustable[TokenIds | dict[str, TokenIds]] = ()
    """Tokens whose embeddings the adapter trains, as separate rows; where the base model ties its
    head to the embeddings, the head has them too. By the name of the embedding or the head:
    `{embed_tokens: [7], lm_head: [7, 8]}`."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _check_target_modules(cls, targets: Any) -> Any:
        groups = get_args(TargetGroup)
        if isinstance(targets, str):
            if targets in groups:
                return targets
            if is_pattern(targets):
                return check_pattern(targets)
        elif isinstance(targets, list | tuple) and all(isinstance(name, str) for name in targets):
            return targets
        raise ValueError(
            f"target_modules must be {', '.join(groups)}, a list of module names, or a regular "
            f"expression of whole paths, got {shown(targets)}"
        )

    @abstractmethod
    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """Make an adapter with initial weights.

        Args:
            name: Unique on its host.
            base_layers: The base model's projections.
            dtype: Of the trained weights, at least float32.
            seed: Of the initial weights, together with each tensor's name.
        """

    def tensor_shapes(self, base: BaseInfo) -> dict[str, Shape]:
        """Give the name and shape of every tensor on a base model that the settings fit."""
        # They are read off an adapter that is built without memory.
        with torch.device("meta"):
            layers = base.layers_without_weights()
            self.check_fits(layers)
            adapter = self.build("shapes", layers, torch.float32, seed=0)
        return {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}

    def targeted_keys(self, base_layers: Sequence[BaseLayer]) -> frozenset[str]:
        """Resolve `target_modules` to keys of projections, `layers.{L}.{block}.{projection}`."""
        return select(self.target_modules, self.layers_to_adapt(base_layers)).keys

    def may_adapt(self, block: Block) -> bool:
        """Whether settings besides `target_modules` leave a block to be adapted."""
        return True

    def with_targets(self, keys: Set[str], base_layers: Sequence[BaseLayer]) -> AdapterConfig:
        """Return the settings with targets that mean exactly these projections."""
        names = name_targets(keys, self.layers_to_adapt(base_layers))
        return self.model_copy(update={"target_modules": names})

    def layers_to_adapt(self, base_layers: Sequence[BaseLayer]) -> list[BaseLayer]:
        """Leave out the blocks that other settings than `target_modules` leave out."""
        return [
            replace(layer, blocks=tuple(filter(self.may_adapt, layer.blocks)))
            for layer in base_layers
        ]

    def fitted(self, base_layers: Sequence[BaseLayer]) -> AdapterConfig:
        """Return the settings with those written out that depend on the base model."""
        return self

    def check_fits(self, base_layers: Sequence[BaseLayer]) -> None:
        """Raise an AdapterError if a setting means nothing on a base model."""
        adapted = self.adapted(base_layers)
        selection = select(self.target_modules, self.layers_to_adapt(base_layers))
        if selection.unknown or not adapted:
            raise _no_such_target(self.target_modules, selection.unknown, base_layers)
        for word in selection.stack_words:
            warnings.warn(
                f"target_modules: {word} names no linear layer of this base model, and training "
                f"continues on its experts' weights of that name; write experts.{word}",
                stacklevel=2,
            )
        for base in adapted:
            self._check_computes_on(base)

    def _check_computes_on(self, base: BaseProjection) -> None:
        if base.num_experts is not None and not self.adapts_stacks:
            raise AdapterError(
                f"{self.title} works on single projections, and {base.key} is a stack of experts; "
                "use method: lora or mixlora there, or adapt the whole block with "
                "target_modules: [attention, moe]"
            )
        if self.needs_weights and not base.has_weight:
            raise AdapterError(
                f"{self.title} decomposes weights, and {base.key} is a whole block without one; "
                "set weight_decomposition: false, or target_modules: [attention, experts]"
            )

    def adapted(self, base_layers: Sequence[BaseLayer]) -> list[BaseProjection]:
        """Return the projections that the settings adapt, in the base model's order."""
        keys = self.targeted_keys(base_layers)
        return [base for layer in base_layers for base in layer.projections if base.key in keys]

    @property
    def experts_per_token(self) -> int | None:
        """How many experts a router chooses for a token; None where it chooses none."""
        return None

    @property
    def experts_per_router(self) -> int:
        """The most experts that a router chooses from; 0 without routers."""
        return 0

    @property
    def collapse_advice(self) -> str:
        """What to change where routers have collapsed."""
        return "lower learning_rate"

    def auxiliary_loss(
        self, routing: Records, samples: Samples = None, add_up: AddUp = keep
    ) -> Tensor | None:
        """Compute what the method adds to the objective, with its coefficient; None for nothing.

        Args:
            routing: The records of one forward.
            samples: Whose tokens these are.
            add_up: Adds a tensor up over everybody who has a part of the micro-batch.
        """
        return None

    @property
    def scaling(self) -> float:
        return 1.0

    def summary(self) -> dict[str, Any]:
        """The settings that decide what the weights compute, which `start_from` compares."""
        return {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if _ADJUSTABLE not in field.metadata
        }


def _no_such_target(
    targets: Targets, unknown: Sequence[str], base_layers: Sequence[BaseLayer]
) -> AdapterError:
    """Say which targets a base model has."""
    paths = dict[str, None]()
    kinds = dict[str, None]()
    for layer in base_layers:
        for block in layer.blocks:
            kinds[block.kind] = None
            for name, base in block.projections.items():
                if base.closed_experts is not None:
                    return AdapterError(
                        f"experts must have weights that can be read, got {base.closed_experts}; "
                        "set target_modules: [attention, moe], or load a base model in another "
                        "form, dequantized for example"
                    )
                if base.has_weight:
                    paths[f"{block.path}.{name}"] = None
    got = ", ".join(unknown) or targets
    return AdapterError(
        f"target_modules must name projections of the base model's layers ({', '.join(paths)}), by "
        f"the last words of their paths, or be {ALL_LINEAR}, {', '.join(kinds)}; got {got}"
    )


class Adapter(nn.Module, ABC):
    """A named set of trained weights on a base model.

    Args:
        name: Unique in its host.
        config: The method's settings.
        base_layers: The base model's projections.
        layers: For each of them, the weights of both blocks by the names of block and projection,
            and under other names what else the method has in a layer.
    """

    def __init__(
        self,
        name: str,
        config: AdapterConfig,
        base_layers: Sequence[BaseLayer],
        layers: Sequence[nn.ModuleDict],
    ):
        super().__init__()
        self.name = name
        self.config = config
        self.base_layers = list(base_layers)
        self.layers = nn.ModuleList(layers)
        self.dropout_of_ffn = config.dropout
        self.own_modules = nn.ModuleList()
        self.prompt: PromptForm | None = None  # how its training data writes prompts
        self.is_trained = True  # what isn't is refused in training
        self.members: Mapping[str, Adapter] = {}  # the adapters that it is made of, by name
        # Plain dicts: a forward asks for blocks by the thousand, and ModuleDict looks names up.
        self._blocks: list[dict[str, dict[str, Projection]]] = [
            {b.path: dict(layer[b.module_name].items()) for b in base.blocks}  # ty: ignore[not-callable]
            for base, layer in zip(base_layers, layers, strict=True)
        ]

    @abstractmethod
    def ffn(
        self,
        block: Block,
        weights: FfnWeights,
        hidden_states: Tensor,
        outputs: Sequence[Tensor],
        tokens: SegmentTokens,
    ) -> FfnRows:
        """Compute the adapter's half of an FFN block.

        Args:
            block: The base's block, with its gating.
            weights: What `ffn_weights` returned for it.
            hidden_states: The block's input, [T, D].
            outputs: What the base's input projections make of it, as gate and up, [T, F] each.
            tokens: Which tokens are real, and random numbers.
        """

    @abstractmethod
    def ffn_weights(self, block: Block, dtype: torch.dtype) -> FfnWeights | ExpertWeights:
        """Bring the weights of an FFN block, or of one of stacked experts, into compute form."""

    def expert_choice(
        self, block: Block, hidden_states: Tensor, tokens: SegmentTokens
    ) -> Routing | None:
        """Choose among the LoRA experts in each of the base's; None where there is only one."""
        return None

    def stack_key(self) -> Hashable | None:
        """Return what adapters have in common that can decode side by side; None for none.

        Adapters with one key have tensors of the same shapes; values, scalings and seeds may
        differ. A method that has a key gives `stack_ffn` too.
        """
        return None

    @classmethod
    def stack_ffn(
        cls, adapters: Sequence[Any], block: Block, weights: Sequence[FfnWeights]
    ) -> StackedFfn:
        """Put side by side what `ffn_weights` returned for adapters with the same `stack_key`."""
        raise NotImplementedError(f"{cls.__name__} has no stacked form")

    def is_as_in(self, kind: type[Adapter], *names: str) -> bool:
        """Whether functions are still those of a class, which a stack computes."""
        return all(getattr(type(self), name) is getattr(kind, name) for name in names)

    def as_moe(self, block: Block) -> MoeFfn:
        """See an FFN block as experts that each have whole weights, a few of them for a token."""
        raise self._no_moe(self.config.title)

    def _no_moe(self, variant: str) -> AdapterError:
        return AdapterError(
            f"adapter {self.name!r} must be a mixture whose routers choose top_k whole FFN experts "
            f"for each token to have the form of an MoE checkpoint, got {variant}"
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return views of all trained weights, by their names (tensor_names.py)."""
        return tensors_of(self.modules())

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in, by the names of `tensors()`; magnitudes that are missing stay."""
        views = self.tensors()
        # All is checked before the first value is copied.
        required = {name for name in views if not name.endswith(".magnitude")}
        faulty = [
            name
            for name in sorted(required | tensors.keys())
            if name not in views or name not in tensors or views[name].shape != tensors[name].shape
        ]
        if faulty:
            raise AdapterError(
                f"tensors don't match adapter {self.name!r}: {', '.join(faulty[:3])} (of "
                f"{len(faulty)}) are missing, unexpected or of another shape; use one adapter's "
                "files"
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                views[name].copy_(tensor)

    @property
    def parts(self) -> Sequence[Adapter]:
        """Itself, and the adapters that it is made of."""
        return [self, *self.members.values()]

    def member(self, name: str) -> Adapter:
        """Return one of the adapters that it is made of, which is called `ADAPTER/NAME`."""
        if name not in self.members:
            names = ", ".join(self.members) or "none"
            raise AdapterError(
                f"{self.name!r} has no expert {name!r}; choose one of its experts ({names})"
            )
        return self.members[name]

    @property
    def forms_differ(self) -> bool:
        """Whether the adapters that it is made of have different forms of prompts."""
        prompts = [member.prompt for member in self.members.values()]
        return any(prompt != prompts[0] for prompt in prompts)

    def check_is_trained(self) -> None:
        if not self.is_trained:
            raise AdapterError(
                f"adapter {self.name!r} is not trained, because it contains other adapters, or is "
                "part of one; train those adapters, or a LoRA made by `combine`; fit_router or "
                "`loraloom combine` fits a router by prompt"
            )

    def projections(self) -> Iterator[Projection]:
        for blocks in self._blocks:
            for block in blocks.values():
                yield from block.values()

    @property
    def adapts_stacks(self) -> bool:
        """Whether some of its projections are of all experts of a base model."""
        return any(projection.base.num_experts is not None for projection in self.projections())

    @property
    def is_mergeable(self) -> bool:
        """Whether a weight for each projection computes the same, the same for all tokens."""
        if self.config.experts_per_router:
            return False
        return not any(projection.maps_rank_space for projection in self.projections())

    def weights_on(self, block: Block) -> Mapping[str, Projection]:
        """Return the weights on a block's projections, by the projections' names."""
        return self._blocks[block.layer][block.path]

    def adapts(self, block: Block) -> bool:
        return len(self.weights_on(block)) > 0

    @cached_property
    def widest_input(self) -> int:
        """The most features that a projection of the base's blocks reads."""
        return max(base.in_features for layer in self.base_layers for base in layer.projections)

    @cached_property
    def adapts_gated_blocks(self) -> bool | None:
        """Whether the adapter has weights in all dense FFN blocks; None: in some."""
        adapted = {
            self.adapts(block)
            for layer in self.base_layers
            for block in layer.blocks
            if block.is_dense
        }
        return None if len(adapted) > 1 else True in adapted

    def own_at(self, path: str) -> OwnModule | None:
        """Return what the adapter has in place of a module of the base model; None for nothing."""
        for module in self.own_modules:
            if module.path == path:
                return module  # ty: ignore[invalid-explicit-return]
        return None

    def group_low_rank(
        self, group: InputGroup, hidden_states: Tensor, site: Site | str, tokens: SegmentTokens
    ) -> Tensor:
        """Compute `dropout(x) Aᵀ` of projections that share their input, [T, P]."""
        dropout = self.config.dropout
        dtype = group.A.dtype
        keep = None
        if tokens.noise is not None and dropout > 0:
            width = hidden_states.shape[-1]
            keep = partial(tokens.noise.keep_mask, site, width, dropout, dtype)
        return down_project(hidden_states.to(dtype), group.A, keep, dropout)

    def ffn_dropout(
        self, block: Block, num_slots: int, dtype: torch.dtype, tokens: SegmentTokens
    ) -> FfnDropout:
        """Return functions that draw an FFN block's masks, of its input and of each slot."""
        dropout = self.dropout_of_ffn
        if tokens.noise is None or dropout == 0:
            return FfnDropout.none(num_slots)
        draw = tokens.noise.keep_mask
        width = block.output.in_features
        inputs = partial(draw, _site(block, Site.FFN_INPUT), block.hidden_size, dropout, dtype)
        slots = [
            partial(draw, _site(block, Site.FFN_SLOT + slot), width, dropout, dtype)
            for slot in range(num_slots)
        ]
        return FfnDropout(dropout, inputs, slots)

    @cached_property
    def _shapes(self) -> int:
        """A hash of what it has; asked for when it decodes, as buffers may come after building."""
        weights = [*self.named_parameters(), *self.named_buffers()]
        return hash(tuple((name, tuple(weight.shape)) for name, weight in weights))


def _site(block: Block, site: int) -> int | str:
    # A layer may have several such blocks; those that are within another draw by their path.
    return site if "." not in block.path else f"{block.path}.{site}"


def tensors_of(modules: Iterable[nn.Module | None]) -> dict[str, Tensor]:
    """Return the tensors of those modules that have trained weights, under their names."""
    tensors: dict[str, Tensor] = {}
    for module in modules:
        if isinstance(module, Weights):
            tensors.update(module.tensors())
    return tensors
