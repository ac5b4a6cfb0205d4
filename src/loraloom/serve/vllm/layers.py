"""vLLM's FFN blocks with routers, for tokens of different adapters without a loop over these.

Two custom operations stand around the base's output projection, so that torch.compile and CUDA
graphs see vLLM's own linear layer. What an adapter is lies in tensors that the tokens look up:
nothing waits for the device, and captured graphs serve all. Plain LoRAs are mixtures of one expert.

Axes: T tokens, K slots of a token, C experts that there is room for, S rank that there is room for,
F feed-forward, L adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from loraloom.serve.vllm.folding import PIECES

_OPERATIONS = torch.library.Library("loraloom", "FRAGMENT")


def choose(
    scores: Float[Tensor, "T S"],
    described: Float[Tensor, "L 2 S"],
    adapters: Int[Tensor, " T"],
    num_slots: int,
) -> tuple[Bool[Tensor, "K T S"], Float[Tensor, "K T 1"]]:
    """Choose the experts of tokens: the columns of each one's slots, and their weights."""
    description = described.index_select(0, adapters.clamp_min(0)).float()  # (T, 2, S)
    column_experts, numbers = description.unbind(1)
    num_experts, top_k = numbers[:, :2].split(1, dim=1)
    max_experts = scores.shape[1] // PIECES
    slots = torch.arange(num_slots, device=scores.device)
    experts = torch.arange(max_experts, device=scores.device)
    pieces = scores[:, : max_experts * PIECES].unflatten(1, (max_experts, PIECES))
    logits = pieces.sum(-1)
    logits = logits.masked_fill(experts >= num_experts, -torch.inf)  # (T, C)
    best, selected = logits.topk(num_slots, dim=-1)
    best = best.masked_fill(slots >= top_k, -torch.inf)
    is_routed = num_experts > 0
    is_first = (slots == 0).float()
    weights = torch.where(is_routed, best.softmax(-1), is_first)
    chosen = torch.where(is_routed, selected + 1, 0)  # (T, K), counted from 1 as columns are
    columns = column_experts == chosen.T.unsqueeze(-1)
    has_adapter = (adapters >= 0).unsqueeze(-1)
    return columns & has_adapter, weights.T.unsqueeze(-1)


class MixtureFfn(nn.Module):
    """The forward of an FFN block whose tokens may have experts; mixed into vLLM's own class."""

    gate_up_proj: Any
    down_proj: Any
    act_fn: Any
    router: Any
    place: str
    slots: int
    sum_over_devices: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj.base_layer(x)
        hidden, rank_space = torch.ops.loraloom.mix_experts(
            x, gate_up, self.down_proj.input_size, _rank(self.router), self.place
        )
        if self.down_proj.tp_size > 1:
            # each device has the columns of A that its hidden states meet
            rank_space = self.sum_over_devices(rank_space)
        output, _ = self.down_proj.base_layer(hidden)
        return torch.ops.loraloom.add_update(output, rank_space, self.place)

    def mix_experts(self, x: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        inputs, router = self.gate_up_proj, self.router
        if inputs.punica_wrapper.no_lora:  # said on CPUs alone
            return self.act_fn(gate_up), x.new_zeros(len(x), _rank(router), dtype=torch.float32)
        described = router.lora_b_stacked[0].squeeze(1)
        adapters = _adapters(inputs, len(x))
        scores = _shrink(router, x)[0]
        columns, weights = choose(scores, described, adapters, self.slots)
        low_rank = _shrink(inputs, x)
        low_rank = torch.where(columns.unsqueeze(1), low_rank, 0.0)  # (K, P, T, S)
        updated = _expand_slots(inputs, gate_up, low_rank)
        # zeros of the base's tokens may have met some adapter's weights, and these may be NaN
        has_columns = columns.any(-1).any(0)
        mixed = torch.where(has_columns.unsqueeze(-1), updated, gate_up)
        states = self.act_fn(mixed.flatten(0, 1))
        states = states.unflatten(0, (-1, len(x)))  # (K, T, F)
        rank_space = torch.stack([_shrink(self.down_proj, slot)[0] for slot in states])
        rank_space = torch.where(columns, rank_space, 0.0)
        # down-projection and mixing are linear, so slots are added up in front of both
        hidden = states * weights.to(states.dtype)
        return hidden.sum(0), (rank_space * weights).sum(0)

    def add_update(self, output: Tensor, rank_space: Tensor) -> Tensor:
        if self.down_proj.punica_wrapper.no_lora:
            return output.clone()
        is_base = _adapters(self.down_proj, len(output)).unsqueeze(1) < 0
        updated = _expand_slots(self.down_proj, output, rank_space[None, None])[0]
        return torch.where(is_base, output, updated)


def _adapters(layer: Any, num_tokens: int) -> Tensor:
    # slot of each token's adapter, [T]; of those that fill a graph up, whatever was there
    return layer.punica_wrapper._token_lora_indices[:num_tokens]


def _rank(layer: Any) -> int:
    return layer.lora_b_stacked[0].shape[-1]


def _shrink(layer: Any, x: Tensor) -> Tensor:
    """A product of each token with its adapter's A, for each slice, [P, T, S] float32."""
    buffer = x.new_zeros(layer.n_slices, len(x), _rank(layer), dtype=torch.float32)
    layer.punica_wrapper.add_shrink(buffer, x, layer.lora_a_stacked, 1.0)
    return buffer


def _expand_slots(layer: Any, output: Tensor, low_rank: Tensor) -> Tensor:
    """Add the products of slots' rank space, [K, P, T, S], with each token's B to an output."""
    slots = output.repeat(len(low_rank), 1, 1)
    for slot, slot_low_rank in enumerate(low_rank):
        layer.punica_wrapper.add_expand(
            slots[slot], slot_low_rank, layer.lora_b_stacked, layer.output_slices, add_inputs=True
        )
    return slots


def define_operations(block_at: Callable[[str], MixtureFfn]) -> None:

    def mix_experts(
        x: Tensor, gate_up: Tensor, hidden_size: int, rank: int, place: str
    ) -> tuple[Tensor, Tensor]:
        return block_at(place).mix_experts(x, gate_up)

    def mix_shapes(
        x: Tensor, gate_up: Tensor, hidden_size: int, rank: int, place: str
    ) -> tuple[Tensor, Tensor]:
        hidden = gate_up.new_empty(len(x), hidden_size)
        return hidden, x.new_empty(len(x), rank, dtype=torch.float32)

    def add_update(output: Tensor, rank_space: Tensor, place: str) -> Tensor:
        return block_at(place).add_update(output, rank_space)

    def add_shapes(output: Tensor, rank_space: Tensor, place: str) -> Tensor:
        return torch.empty_like(output)

    for operation, shapes in ((mix_experts, mix_shapes), (add_update, add_shapes)):
        name = operation.__name__
        _OPERATIONS.define(name + torch.library.infer_schema(operation, mutates_args=()))
        _OPERATIONS.impl(name, operation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"loraloom::{name}", shapes, lib=_OPERATIONS)
