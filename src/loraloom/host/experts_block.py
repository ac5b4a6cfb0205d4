"""The experts of a base model's mixture, with the adapters of all rows.

Axes: T tokens of the batch, K experts of each, D hidden.

transformers calls the experts of some seventy model types in one way, with states, each token's
experts and their weights. Replacing that call's target leaves the router, its top-k, shared experts
and scaling in front of it the base model's. An instance's `forward` is the door that quantized
modules, hub kernels and other programs' patches of the class leave alone; transformers' registry of
experts functions is chosen by the config, for all experts of a model, and others register there.

Source: transformers 5.24, `integrations/moe.py` (`use_experts_implementation`).
"""

import torch
from torch import Tensor, nn

from loraloom.base.blocks import Block
from loraloom.host.forward import ForwardContext, current_forward
from loraloom.host.layout import Segment
from loraloom.host.prepared_weights import outside_autocast
from loraloom.ops.expert_rows import BaseExperts, ExpertUpdate, expert_rows


class ExpertsBlock:
    """The forward of an experts module."""

    def __init__(self, owner: object, block: Block, module: nn.Module):
        self.owner = owner
        self.block = block
        self.base_forward = module.forward

    def __call__(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        forward = current_forward(self.owner)
        adapts = forward is not None and any(each.adapts(self.block) for each in forward.adapters)
        # Autograd would keep dequantized weights for the backward pass.
        needs_gradient = torch.is_grad_enabled() and hidden_states.requires_grad
        if not adapts and not (needs_gradient and self.block.output.quantized is not None):
            return self.base_forward(hidden_states, index, weights)
        (up,), (down,) = self.block.groups
        projections = self.block.projections
        base = BaseExperts(projections[up], projections[down], self.block.gating)
        with outside_autocast(hidden_states):
            if forward is None or not adapts:
                updates = []
            elif forward.stacked is not None:
                updates = forward.stacked.expert_updates(self.block)
            else:
                updates = self._updates(forward, hidden_states, index.shape[1])
            return expert_rows(hidden_states, index, weights, base, updates)

    def _updates(
        self, forward: ForwardContext, hidden_states: Tensor, top_k: int
    ) -> list[ExpertUpdate]:
        layout = forward.layout
        if len(layout.segments) == 1:
            return [self._update(forward, layout.segments[0], None, hidden_states, top_k)]
        numbers = torch.arange(len(hidden_states), device=hidden_states.device)
        tokens = layout.split(layout.by_row(numbers.unsqueeze(1)))
        return [
            self._update(forward, segment, places.squeeze(1), hidden_states, top_k)
            for segment, places in zip(layout.segments, tokens, strict=True)
            if segment.row is not None and segment.row[0].adapts(self.block)
        ]

    def _update(
        self,
        forward: ForwardContext,
        segment: Segment,
        places: Tensor | None,
        hidden_states: Tensor,
        top_k: int,
    ) -> ExpertUpdate:
        assert segment.row is not None
        adapter, _ = segment.row
        block = self.block
        tokens = forward.tokens(segment, block.layer, hidden_states.device)
        states = hidden_states if places is None else hidden_states[places]
        routing = adapter.expert_choice(block, states, tokens)
        num_slots = top_k if routing is None else top_k * routing.top_k
        dropout = adapter.ffn_dropout(block, num_slots, hidden_states.dtype, tokens)
        return ExpertUpdate(
            weights=forward.forms.ffn(segment.row, block, hidden_states.dtype),
            tokens=places,
            choice=None if routing is None else routing.selected_experts,
            choice_weights=None if routing is None else routing.routing_weights,
            keep_input=dropout.keep_input,
            keep_slots=[draw for draw in dropout.keep_slots if draw is not None],
            dropout=dropout.probability,
        )
