"""Thin wrappers in front of a base model's attention projections and FFN blocks.

Axes: B batch, L sequence, T tokens of a segment, D hidden, F feed-forward, O out_features.

The base modules stay the ones that transformers made: an attention projection gets a forward hook,
an FFN block an instance `forward`. Both step aside when no adapter wants them. Under autocast the
base computes in its dtype; adapters choose theirs: that of the base's outputs for low-rank
products, float32 for routers and losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import FfnRows, FfnShape
from loraloom.models.autocast import outside_autocast
from loraloom.models.running import AttentionPart, RunningForward, RunningSlot
from loraloom.models.stacking import StackedForward
from loraloom.ops.dropout import Site
from loraloom.ops.low_rank import UpProjection, add_low_rank_, decompose


class AttentionProjection:
    """A forward hook that adds every segment's update to a projection's output."""

    def __init__(self, slot: RunningSlot, layer: int, name: str, group: Sequence[str], site: Site):
        self.slot = slot
        self.layer = layer
        self.name = name
        self.group = tuple(group)
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the adapted output, [B, L, O]."""
        forward = self.slot.current
        if forward is None or not forward.has_adapters:
            return output
        with outside_autocast(output):
            return self._adapted(forward, module, args[0], output)

    def _adapted(
        self, forward: RunningForward, module: nn.Module, hidden_states: Tensor, output: Tensor
    ) -> Tensor:
        if forward.stacked is not None:
            return forward.stacked.project(
                self.layer, self.group, self.name, hidden_states, output, module
            )
        parts = forward.attention_parts(
            self.layer, self.group, self.site, hidden_states, output.dtype
        )
        sides = [None if part is None else part[0].projections.get(self.name) for part in parts]
        if all(side is None for side in sides):
            return output
        decomposed = any(side is not None and side.row_scale is not None for side in sides)
        if decomposed or forward.layout.row_order is not None:
            return self._rebuilt(forward, parts, sides, output)
        return self._added(forward, parts, sides, output)

    def _added(
        self,
        forward: RunningForward,
        parts: Sequence[AttentionPart | None],
        sides: Sequence[UpProjection | None],
        output: Tensor,
    ) -> Tensor:
        spans, low_ranks, up_projections = [], [], []
        for segment, part, side in zip(forward.layout.segments, parts, sides, strict=True):
            if part is not None and side is not None:
                spans.append(segment.tokens)
                low_ranks.append(part[1][:, side.columns])
                up_projections.append(side.B)
        return add_low_rank_(output, spans, low_ranks, up_projections)

    def _rebuilt(
        self,
        forward: RunningForward,
        parts: Sequence[AttentionPart | None],
        sides: Sequence[UpProjection | None],
        output: Tensor,
    ) -> Tensor:
        rows = []
        outputs = forward.layout.split(output)
        for tokens, part, side in zip(outputs, parts, sides, strict=True):
            rows.append(tokens if part is None or side is None else _updated(tokens, part[1], side))
        return forward.layout.join(rows, output.shape)


def _updated(output: Tensor, low_rank: Tensor, side: UpProjection) -> Tensor:
    low_rank = low_rank[:, side.columns]
    if side.row_scale is None:
        return torch.addmm(output, low_rank, side.B)
    return decompose(output, low_rank @ side.B, side.row_scale, side.bias)


class FfnBlock:
    """An FFN block's forward: the base's projections once for all rows, adapters in between."""

    def __init__(
        self, slot: RunningSlot, layer: int, module: nn.Module, shape: FfnShape, activation: str
    ):
        self.slot = slot
        self.layer = layer
        self.shape = shape
        self.base_forward = module.forward
        self.inputs = [module.get_submodule(name) for name in shape.inputs]
        self.output = module.get_submodule(shape.output)
        self.act = getattr(module, activation)

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """Return the block's output, [B, L, D]."""
        forward = self.slot.current
        if forward is None or not any(
            adapter is not None and adapter.adapts_ffn(self.layer) for adapter in forward.adapters
        ):
            return self.base_forward(hidden_states)
        gate, up = self._base_inputs(hidden_states)
        if forward.stacked is not None:
            return self._stacked(forward, forward.stacked, hidden_states, gate, up)
        layout = forward.layout
        gates = layout.split(gate)
        ups = [None] * len(gates) if up is None else layout.split(up)
        with outside_autocast(gate):
            parts = [
                self._segment(forward, index, tokens, gates[index], ups[index])
                for index, tokens in enumerate(layout.split(hidden_states))
            ]
        sizes = [len(part.hidden) for part in parts]
        hidden = parts[0].hidden if len(parts) == 1 else torch.cat([p.hidden for p in parts])
        outputs = self.output(hidden).split(sizes)
        with outside_autocast(gate):
            rows = [part.finish(output) for part, output in zip(parts, outputs, strict=True)]
        return layout.join(rows, torch.Size((*hidden_states.shape[:-1], rows[0].shape[-1])))

    def _stacked(
        self,
        forward: RunningForward,
        stacked: StackedForward,
        hidden_states: Tensor,
        gate: Tensor,
        up: Tensor | None,
    ) -> Tensor:
        output, routing = stacked.ffn(
            self.layer, hidden_states, gate, up, self.act, self.output, recording=forward.recording
        )
        for name, record in routing.items():
            forward.record(name, record)
        return output

    def _base_inputs(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.shape.fused:
            gate, up = self.inputs[0](hidden_states).chunk(2, dim=-1)
            return gate, up
        if len(self.inputs) == 1:
            return self.inputs[0](hidden_states), None
        return self.inputs[0](hidden_states), self.inputs[1](hidden_states)

    def _segment(
        self, forward: RunningForward, index: int, tokens: Tensor, gate: Tensor, up: Tensor | None
    ) -> FfnRows:
        segment, adapter = forward.layout.segments[index], forward.adapters[index]
        if adapter is None or not adapter.adapts_ffn(self.layer):
            hidden = self.act(gate)
            return FfnRows(hidden if up is None else hidden * up, lambda output: output)
        told = segment.at_layer(self.layer, tokens.device)
        part = adapter.ffn(self.layer, tokens, gate, up, self.act, told)
        if part.routing is not None:
            forward.record(adapter.name, part.routing)
        return part
