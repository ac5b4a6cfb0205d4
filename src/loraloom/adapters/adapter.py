"""The contract of a method's weights: what hosts, optimizers and files ask of an adapter.

Axes: T tokens of one segment, I in_features, D hidden, F feed-forward, E experts, P columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraloom.adapters.base import BaseLayer
from loraloom.adapters.config import AdapterConfig, RouterLossConfig
from loraloom.config.data import PromptForm
from loraloom.errors import AdapterError
from loraloom.ops.dropout import SampleNoise, Site
from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights
from loraloom.ops.low_rank import InputGroup, down_project
from loraloom.routing.losses import AddUp, router_loss, whole
from loraloom.routing.record import LayerRouting
from loraloom.routing.routes import beyond_capacity

if TYPE_CHECKING:
    from loraloom.adapters.low_rank import Projection
    from loraloom.ops.stacked import StackedFfn


@dataclass(frozen=True)
class SegmentTokens:
    """An adapter's tokens in a layer.

    Args:
        layer: Index of the decoder layer.
        real: True at real tokens, [T]; None when there is no padding.
        real_index: Their positions.
        noise: Random numbers for dropout and jitter; None outside training.
        record: Takes what a router did; None where nobody asks.
    """

    layer: int
    real: Tensor | None = None
    real_index: Tensor | None = None
    noise: SampleNoise | None = None
    record: Callable[[LayerRouting], None] | None = None

    def record_routing(
        self,
        router_logits: Tensor,
        selected_experts: Tensor,
        routing_weights: Tensor,
        projection: str | None = None,
    ) -> None:
        """Record what a router did with the real tokens among these.

        Args:
            router_logits: [T, E].
            selected_experts: [T, K].
            routing_weights: [T, K].
            projection: Whose router it is, as `self_attn.q_proj`; None for an FFN block's.
        """
        if self.record is None:
            return
        values = (router_logits, selected_experts, routing_weights)
        if self.real_index is not None:
            values = [value.index_select(0, self.real_index) for value in values]
        logits, selected, weights = values
        self.record(LayerRouting(self.layer, logits, selected, weights, projection))

    def beyond_capacity(self, selected_experts: Tensor, capacity: int | None) -> Tensor | None:
        """Tell which tokens their expert doesn't take, [T, 1]; None where it takes all.

        Args:
            selected_experts: [T, 1].
            capacity: Tokens of a sample that an expert takes in training.
        """
        if capacity is None or self.noise is None:
            return None
        samples = [span.tokens for span in self.noise.spans]
        return beyond_capacity(selected_experts.squeeze(1), samples, capacity).unsqueeze(1)


@dataclass(frozen=True)
class SampleTokens:
    """A sample among the tokens of a record.

    Args:
        num_tokens: Its real tokens.
        expert_group: Of the experts that are meant for its kind of data, 0 or 1.
    """

    num_tokens: int
    expert_group: int = 0


@dataclass(frozen=True)
class FfnRows:
    """An adapter's half-done FFN block, waiting for the base's output projection.

    Args:
        hidden: Rows to send through it, [n, F].
        finish: From its output for these rows, [n, D], to the block's output, [T, D].
    """

    hidden: Tensor
    finish: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MoeFfn:
    """An FFN block as mixture-of-experts checkpoints have it: softmax, top_k, renormalised.

    Args:
        router: [E, D].
        top_k: Experts of each token.
        weight: From an expert, a projection's name and a dtype to its whole weight, [O, I].
    """

    router: Tensor
    top_k: int
    weight: Callable[[int, str, torch.dtype], Tensor]

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.router)


class Weights(nn.Module, ABC):
    """Trained weights that know their names in files."""

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each tensor under its name (keys.py), as a view of the parameters."""


class OwnModule(Weights):
    """What an adapter has in place of a module of the base model.

    Args:
        path: The module's, in the base model.
    """

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    @abstractmethod
    def compute_form(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Bring the weights into the form in which `outputs` takes them, the base's dtype."""

    @abstractmethod
    def outputs(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor],
        inputs: Tensor,
        base_forward: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute what the adapter's rows get from the module.

        Args:
            module: The base model's.
            weights: What `compute_form` returned.
            inputs: Of the adapter's rows.
            base_forward: The module's own forward.
        """

    @abstractmethod
    def stored(self, name: str, weight: Tensor) -> Tensor:
        """Give a parameter with which the module itself computes the same.

        Args:
            name: Of the parameter in the module.
            weight: The base model's.
        """


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
        self.own_modules = nn.ModuleList()
        self.prompt: PromptForm | None = None  # how its training data writes prompts
        self._blocks: list[dict[str, dict[str, Projection]]] = [
            {block: dict(layer[block].items()) for block in base.blocks}  # pyright: ignore
            for base, layer in zip(base_layers, layers, strict=True)
        ]

    def own_at(self, path: str) -> OwnModule | None:
        """Return what the adapter has in place of a module of the base model; None for nothing."""
        return next((own for own in self.own_modules if own.path == path), None)  # pyright: ignore

    @cached_property
    def _shapes(self) -> int:
        """A hash of what it has; asked for when it decodes, as buffers may come after building."""
        weights = [*self.named_parameters(), *self.named_buffers()]
        return hash(tuple((name, tuple(weight.shape)) for name, weight in weights))

    @abstractmethod
    def ffn(
        self,
        layer: int,
        weights: FfnWeights,
        hidden_states: Tensor,
        gate: Tensor,
        up: Tensor | None,
        act: Activation,
        tokens: SegmentTokens,
    ) -> FfnRows:
        """Compute the adapter's half of an FFN block.

        Args:
            layer: Index of the decoder layer.
            weights: What `ffn_weights` returned for it.
            hidden_states: The block's input, [T, D].
            gate: Base output of the gate, or of the only input projection, [T, F].
            up: Base output of up, [T, F], or None.
            act: The base's activation.
            tokens: Which tokens are real, and random numbers.
        """

    @abstractmethod
    def ffn_weights(self, layer: int, dtype: torch.dtype) -> FfnWeights:
        """Bring the weights of an FFN block into compute form."""

    def stack_key(self) -> Hashable | None:
        """Return what adapters have in common that can decode side by side; None for none.

        Adapters with one key have tensors of the same shapes; values, scalings and seeds may
        differ. A method that has a key gives `stack_ffn` too.
        """
        return None

    @classmethod
    def stack_ffn(
        cls, adapters: Sequence[Any], layer: int, weights: Sequence[FfnWeights]
    ) -> StackedFfn:
        """Put the FFN weights of adapters with the same `stack_key` side by side.

        Args:
            adapters: One or more.
            layer: Index of the decoder layer.
            weights: What `ffn_weights` returned for each.
        """
        raise NotImplementedError(f"{cls.__name__} has no stacked form")

    def as_moe(self, layer: int) -> MoeFfn:
        """See an FFN block as experts that each have whole weights.

        Raises:
            AdapterError: If the method's routers do something else than to choose a few of these
                for each token.
        """
        raise self._no_moe(self.config.title)

    def _no_moe(self, found: str) -> AdapterError:
        return AdapterError(
            f"adapter {self.name!r} must be a mixture whose routers choose top_k whole FFN experts "
            f"for each token to have the form of an MoE checkpoint, got {found}"
        )

    def auxiliary_loss(
        self,
        routing: Sequence[LayerRouting],
        samples: Sequence[SampleTokens] | None = None,
        add_up: AddUp = whole,
    ) -> Tensor | None:
        """Compute what the method adds to the objective, with its coefficient; None for nothing.

        Args:
            routing: The record of one forward, an entry for each router.
            samples: Whose tokens these are, in their order; None where nobody knows.
            add_up: As in `router_loss`.
        """
        config = self.config
        if not routing or not isinstance(config, RouterLossConfig):
            return None
        return router_loss(
            routing,
            aux_loss_coef=config.router_aux_loss_coef,
            z_loss_coef=config.router_z_loss_coef,
            scope=config.router_loss_scope,
            add_up=add_up,
        )

    def projections(self) -> Iterator[Projection]:
        """Yield the weights on all projections, layer after layer."""
        for blocks in self._blocks:
            for block in blocks.values():
                yield from block.values()

    def adapts_ffn(self, layer: int) -> bool:
        """Whether the adapter has weights in this layer's FFN block."""
        return len(self.ffn_block(layer)) > 0

    def attention_block(self, layer: int) -> Mapping[str, Projection]:
        """Return the weights of a layer's attention, by projection."""
        return self._blocks[layer][self.base_layers[layer].attention_block]

    def ffn_block(self, layer: int) -> Mapping[str, Projection]:
        """Return the weights of a layer's FFN block, by projection."""
        return self._blocks[layer][self.base_layers[layer].ffn_block]

    def attention_low_rank(
        self,
        group: InputGroup,
        hidden_states: Tensor,
        site: Site,
        tokens: SegmentTokens,
    ) -> Tensor:
        """Compute `dropout(x) Aᵀ` of projections that share their input, [T, P]."""
        dropout, keep = self.config.dropout, None
        if tokens.noise is not None and dropout > 0:
            keep = tokens.noise.keep_mask(site, hidden_states.shape[-1], dropout, group.A.dtype)
        return down_project(hidden_states.to(group.A.dtype), group.A, keep, dropout)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Copy values in, as in torch.

        Raises:
            AdapterError: With `assign`: an adapter keeps its parameters.
        """
        if assign:
            raise AdapterError(
                f"adapter {self.name!r} keeps its parameters; load with assign=False"
            )
        return super().load_state_dict(state_dict, strict)

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor under its file-neutral name (keys.py), as views of the parameters."""
        holders = (module for module in self.modules() if isinstance(module, Weights))
        return {name: tensor for holder in holders for name, tensor in holder.tensors()}

    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in as files have them; magnitudes that they lack stay as they are.

        Raises:
            AdapterError: If names or shapes differ from this adapter's.
        """
        own = self.tensors()
        kept = {name: tensor for name, tensor in own.items() if name.endswith(".magnitude")}
        self.load_tensors({**kept, **tensors})

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values in, by the names of `tensors()`.

        Raises:
            AdapterError: If names or shapes differ from this adapter's.
        """
        own = self.tensors()
        missing, unexpected = (
            sorted(own.keys() - tensors.keys()),
            sorted(tensors.keys() - own.keys()),
        )
        if missing or unexpected:
            raise AdapterError(
                f"tensors don't match adapter {self.name!r}: "
                f"missing {missing[:3]} ({len(missing)}), unexpected {unexpected[:3]} "
                f"({len(unexpected)}); check that config and weights belong together"
            )
        for name, target in own.items():
            if target.shape != tensors[name].shape:
                raise AdapterError(
                    f"{name} must have shape {list(target.shape)} on this base model, "
                    f"got {list(tensors[name].shape)}"
                )
        with torch.no_grad():
            for name, target in own.items():
                target.copy_(tensors[name])

    def ffn_dropout(
        self,
        dropout: float,
        hidden_size: int,
        gate: Tensor,
        num_slots: int,
        tokens: SegmentTokens,
    ) -> FfnDropout:
        """Draw the masks of an FFN block: one for its input, one for each slot's hidden states."""
        if tokens.noise is None or dropout == 0:
            return FfnDropout.none(num_slots)
        draw, dtype = tokens.noise.keep_mask, gate.dtype
        return FfnDropout(
            dropout,
            draw(Site.FFN_INPUT, hidden_size, dropout, dtype),
            [
                draw(Site.FFN_SLOT + slot, gate.shape[-1], dropout, dtype)
                for slot in range(num_slots)
            ],
        )
