"""What every adapter has: low-rank weights by layer and projection, and its side of the formula.

Axes: T tokens of one segment, I in_features, D hidden, F feed-forward, E experts, R rank, O out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from loraloom.adapters.low_rank import BaseProjection, LowRank
from loraloom.config.adapter import LoraConfig
from loraloom.errors import AdapterError
from loraloom.ops.dropout import SampleNoise, Site
from loraloom.ops.expert_ffn import Activation, FfnDropout, FfnWeights
from loraloom.ops.low_rank import InputGroup, LowRankWeights, UpProjection, down_project
from loraloom.routing.record import LayerRouting


@dataclass(frozen=True)
class FfnShape:
    """How a family builds its FFN block: its input projections, its output, whether it is fused."""

    inputs: tuple[str, ...]
    output: str

    @property
    def fused(self) -> bool:
        """One input projection makes gate and up side by side."""
        return self.inputs == ("gate_up_proj",)


@dataclass(frozen=True)
class BaseLayer:
    """One decoder layer's projections, as an adapter sees them."""

    index: int
    attention_block: str
    attention: Mapping[str, BaseProjection]
    ffn_block: str
    ffn: Mapping[str, BaseProjection]
    ffn_shape: FfnShape
    hidden_size: int


@dataclass(frozen=True)
class SegmentTokens:
    """What an adapter is told of its tokens in a layer.

    Args:
        real: True at real tokens, [T]; None when there is no padding.
        real_index: Their positions.
        noise: Random numbers for dropout and jitter; None outside training.
    """

    real: Tensor | None
    real_index: Tensor | None
    noise: SampleNoise | None


@dataclass(frozen=True)
class FfnRows:
    """An adapter's half-done FFN block, waiting for the base's output projection.

    Args:
        hidden: Rows to send through it, [n, F].
        finish: From its output for these rows, [n, D], to the block's output, [T, D].
        routing: What a mixture's router did.
    """

    hidden: Tensor
    finish: Callable[[Tensor], Tensor]
    routing: LayerRouting | None = None


class Adapter(nn.Module, ABC):
    """A named set of low-rank weights on a base model.

    Args:
        name: Unique in its host.
        config: The method's settings.
        base_layers: The base model's projections.
        dtype: Of the trained weights, at least float32.
        seed: Of the initial weights.

    Raises:
        AdapterError: If `target_modules` names a projection that the base model lacks.
    """

    def __init__(
        self,
        name: str,
        config: LoraConfig,
        base_layers: Sequence[BaseLayer],
        dtype: torch.dtype,
        seed: int,
    ):
        super().__init__()
        self.name = name
        self.config = config
        self.seed = seed
        self.base_layers = list(base_layers)
        targets = resolve_targets(config, base_layers[0])
        self.layers = nn.ModuleList(
            self._build_layer(layer, targets, dtype) for layer in base_layers
        )
        self._blocks: list[dict[str, dict[str, Any]]] = [
            {name: dict(block.items()) for name, block in _blocks_of(layer).items()}
            for layer in self.layers
        ]
        self._prepared: dict[Any, tuple[Hashable, Any]] = {}
        self._all_weights = tuple(self.parameters())

    @abstractmethod
    def _build_layer(
        self, layer: BaseLayer, targets: frozenset[str], dtype: torch.dtype
    ) -> nn.ModuleDict:
        """Make a layer's weights: LowRank modules under the base's block and projection names."""

    @abstractmethod
    def ffn(
        self,
        layer: int,
        hidden_states: Tensor,
        gate: Tensor,
        up: Tensor | None,
        act: Activation,
        tokens: SegmentTokens,
    ) -> FfnRows:
        """Compute the adapter's half of an FFN block.

        Args:
            layer: Index of the decoder layer.
            hidden_states: The block's input, [T, D].
            gate: Base output of the gate, or of the only input projection, [T, F].
            up: Base output of up, [T, F], or None.
            act: The base's activation.
            tokens: Which tokens are real, and random numbers.
        """

    def adapts_ffn(self, layer: int) -> bool:
        """Whether the adapter has weights in this layer's FFN block."""
        return len(self.block(layer, self.base_layers[layer].ffn_block)) > 0

    def attention_group(
        self, layer: int, names: Sequence[str], dtype: torch.dtype
    ) -> InputGroup | None:
        """Return the compute form of attention projections that share their input."""
        block = self.block(layer, self.base_layers[layer].attention_block)
        return self._input_group(layer, [block[name] for name in names if name in block], dtype)

    def attention_low_rank(
        self,
        layer: int,
        group: InputGroup,
        hidden_states: Tensor,
        site: Site,
        tokens: SegmentTokens,
    ) -> Tensor:
        """Compute `dropout(x) Aᵀ` of a group, [T, P]."""
        dropout, keep = self.config.dropout, None
        if tokens.noise is not None and dropout > 0:
            keep = tokens.noise.keep_mask(site, hidden_states.shape[-1], dropout, group.A.dtype)
        return down_project(hidden_states.to(group.A.dtype), group.A, keep, dropout)

    def version(self) -> Hashable:
        """Return what changes when a weight does, or moves.

        Changes in place of a weight's `.data` (`weight.data.mul_(2)`) can't be seen; change the
        weight itself under `torch.no_grad()`.
        """
        return _version_of(self._all_weights)

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
        """Return every tensor under its file-neutral name, as views of the parameters."""
        modules = (m for m in self.modules() if isinstance(m, LowRank))
        named = {name: tensor for module in modules for name, tensor in module.tensors()}
        return named | self._router_tensors()

    def _router_tensors(self) -> dict[str, Tensor]:
        return {
            f"layers.{base.index}.{base.ffn_block}.router": self.router(base.index).detach()
            for base in self.base_layers
            if "router" in self._layer(base.index)
        }

    def router(self, layer: int) -> nn.Parameter:
        """The router's weight in a layer of a mixture, [E, D]."""
        return self._layer(layer)["router"].weight  # pyright: ignore[reportReturnType]

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

    def _layer(self, layer: int) -> nn.ModuleDict:
        return self.layers[layer]  # pyright: ignore[reportReturnType]

    def block(self, layer: int, block: str) -> Mapping[str, LowRank]:
        """Return the weights of a layer's attention or FFN block, by projection."""
        return self._blocks[layer][block]

    def _input_group(
        self, layer: int, modules: Sequence[LowRank], dtype: torch.dtype
    ) -> InputGroup | None:
        if not modules:
            return None
        key = (modules[0].key, dtype)
        return self._prepare(key, modules, lambda: input_group(modules, dtype))

    def _ffn_weights(self, layer: int, dtype: torch.dtype) -> FfnWeights:
        block = self.block(layer, self.base_layers[layer].ffn_block)
        build = lambda: ffn_weights(block, self.base_layers[layer], dtype)  # noqa: E731
        return self._prepare((layer, "ffn", dtype), list(block.values()), build)

    def _ffn_dropout(
        self, layer: int, hidden_size: int, gate: Tensor, top_k: int, tokens: SegmentTokens
    ) -> FfnDropout:
        """Draw the masks of an FFN block: one for its input, one for each slot."""
        block = self.block(layer, self.base_layers[layer].ffn_block)
        probability = next(iter(block.values())).config.dropout
        if tokens.noise is None or probability == 0:
            return FfnDropout.none(top_k)
        draw, dtype = tokens.noise.keep_mask, gate.dtype
        return FfnDropout(
            probability,
            draw(Site.FFN_INPUT, hidden_size, probability, dtype),
            [
                draw(Site.FFN_SLOT + slot, gate.shape[-1], probability, dtype)
                for slot in range(top_k)
            ],
        )

    def _prepare(self, key: Any, modules: Sequence[LowRank], build: Callable[[], Any]) -> Any:
        """Build compute forms; without gradients keep them until a weight changes."""
        if torch.is_grad_enabled():
            self._prepared.pop(key, None)
            return build()
        version = _version_of([weight for module in modules for weight in module.weights])
        known = self._prepared.get(key)
        if known is None or known[0] != version:
            known = self._prepared[key] = (version, build())
        return known[1]


def _blocks_of(layer: Any) -> dict[str, nn.ModuleDict]:
    """Return a layer's blocks of LowRank modules; its router is none of them."""
    return {name: block for name, block in layer.items() if isinstance(block, nn.ModuleDict)}


class _OptimizerSteps:
    """Counts the steps of all optimizers: a fused one doesn't count what it changes."""

    count = 0

    @classmethod
    def add(cls, *_: Any) -> None:
        cls.count += 1


register_optimizer_step_post_hook(_OptimizerSteps.add)


def _version_of(weights: Sequence[Tensor]) -> Hashable:
    places = hash(tuple([weight.data_ptr() for weight in weights]))
    return _OptimizerSteps.count, sum([weight._version for weight in weights]), places


def resolve_targets(config: LoraConfig, layer: BaseLayer) -> frozenset[str]:
    """Turn `target_modules` into names of the base's projections.

    Raises:
        AdapterError: If a name is none of the base's projections.
    """
    groups = {
        "attention": frozenset(layer.attention),
        "ffn": frozenset(layer.ffn),
        "all-linear": frozenset(layer.attention) | frozenset(layer.ffn),
    }
    if isinstance(config.target_modules, str):
        return groups[config.target_modules]
    unknown = sorted(set(config.target_modules) - groups["all-linear"])
    if unknown or not config.target_modules:
        raise AdapterError(
            f"target_modules must name projections of the base model "
            f"({', '.join(sorted(groups['all-linear']))}) or be all-linear, attention or ffn; "
            f"got {', '.join(unknown) or 'an empty list'}"
        )
    return frozenset(config.target_modules)


def input_group(modules: Sequence[LowRank], dtype: torch.dtype) -> InputGroup:
    """Stack the A of projections that share an input; keep the B side of each by name."""
    parts = [module.compute_A(dtype) for module in modules]
    projections, start = {}, 0
    for module, part in zip(modules, parts, strict=True):
        columns = slice(start, start + len(part))
        start = columns.stop
        projections[module.key.rpartition(".")[2]] = UpProjection(
            columns, module.compute_B(dtype), module.row_scale(), module.base.compute_bias(dtype)
        )
    return InputGroup(parts[0] if len(parts) == 1 else torch.cat(parts), projections)


def ffn_weights(block: Mapping[str, LowRank], layer: BaseLayer, dtype: torch.dtype) -> FfnWeights:
    """Bring an FFN block's weights into compute form; gate and up of a fused one are cut apart."""
    shape = layer.ffn_shape
    inputs = [block[name] for name in shape.inputs if name in block]
    group = input_group(inputs, dtype) if inputs else None
    sides = [None if group is None else group.projections.get(name) for name in shape.inputs]
    if shape.fused:
        sides = _halves(sides[0])
    down = block.get(shape.output)
    any_module = next(iter(block.values()))
    return FfnWeights(
        input_A=None if group is None else group.A,
        gate=sides[0],
        up=sides[1] if len(sides) > 1 else None,
        down=None
        if down is None
        else LowRankWeights(down.compute_A(dtype), down.compute_B(dtype), down.row_scale()),
        down_bias=layer.ffn[shape.output].compute_bias(dtype),
        num_experts=any_module.num_experts,
        rank=any_module.config.rank,
        base_combines=layer.ffn[shape.output].is_linear_over_rows,
    )


def _halves(fused: UpProjection | None) -> list[UpProjection | None]:
    """Cut a fused gate_up projection's B side into gate (first half) and up."""
    if fused is None:
        return [None, None]
    scales: Sequence[Tensor | None] = [None, None]
    biases: Sequence[Tensor | None] = [None, None]
    if fused.row_scale is not None:
        scales = fused.row_scale.chunk(2, dim=1)
    if fused.bias is not None:
        biases = fused.bias.chunk(2)
    return [
        UpProjection(fused.columns, lora_B, scale, bias)
        for lora_B, scale, bias in zip(fused.B.chunk(2, dim=1), scales, biases, strict=True)
    ]
