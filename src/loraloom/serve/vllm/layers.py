"""vLLM's FFN blocks with routers: two custom operations around the base's output projection.

torch.compile and CUDA graphs see the operations from outside; between them is vLLM's own linear
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.serve.vllm.mixing import choose, mix

_OPERATIONS = torch.library.Library("loraloom", "FRAGMENT")


class MixtureFfn(nn.Module):
    """The forward of an FFN block whose tokens may have experts; mixed into vLLM's own class.

    It has what these have (`gate_up_proj`, `down_proj`, `act_fn`), and what is named below.
    """

    gate_up_proj: Any
    down_proj: Any
    act_fn: Any
    router: Any
    place: str
    slots: int
    sum_over_devices: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the block for tokens of all adapters, [T, D]."""
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
        """Compute hidden states, [T, F], and the rank space of the output projection, [T, S]."""
        inputs, router = self.gate_up_proj, self.router
        if inputs.punica_wrapper.no_lora:  # said on CPUs alone
            return self.act_fn(gate_up), x.new_zeros(len(x), _rank(router), dtype=torch.float32)
        adapters = _adapters(inputs, len(x))
        scores = _shrink(router, x)[0]
        choice = choose(scores, router.lora_b_stacked[0].squeeze(1), adapters, self.slots)
        return mix(
            gate_up,
            _shrink(inputs, x),
            choice,
            partial(_expand_slots, inputs),
            partial(_shrink_slots, self.down_proj),
            self.act_fn,
        )

    def add_update(self, output: Tensor, rank_space: Tensor) -> Tensor:
        """Add the output projection's update, [T, D]."""
        if self.down_proj.punica_wrapper.no_lora:
            return output.clone()
        is_base = _adapters(self.down_proj, len(output)).unsqueeze(1) < 0
        updated = _expand_slots(self.down_proj, output, rank_space[None, None])[0]
        return torch.where(is_base, output, updated)


def _adapters(layer: Any, num_tokens: int) -> Tensor:
    """Slot of each token's adapter, [T]; of those that fill a graph up, whatever was there."""
    return layer.punica_wrapper._token_lora_indices[:num_tokens]


def _rank(layer: Any) -> int:
    return layer.lora_b_stacked[0].shape[-1]


def _shrink(layer: Any, x: Tensor) -> Tensor:
    """A product of each token with its adapter's A, for each slice, [P, T, S] float32."""
    buffer = x.new_zeros(layer.n_slices, len(x), _rank(layer), dtype=torch.float32)
    layer.punica_wrapper.add_shrink(buffer, x, layer.lora_a_stacked, 1.0)
    return buffer


def _shrink_slots(layer: Any, states: Tensor) -> Tensor:
    """The products of slots' states, [K, T, I], with each token's A, [K, T, S] float32."""
    if not states.is_cpu:
        return torch.stack([_shrink(layer, slot)[0] for slot in states])
    own = _own(layer.lora_a_stacked[0], layer, states.shape[1])
    return torch.einsum("kti,tsi->kts", states, own).float()


def _expand_slots(layer: Any, output: Tensor, low_rank: Tensor) -> Tensor:
    """Add the products of slots' rank space, [K, P, T, S], with each token's B to an output."""
    if not output.is_cpu:
        slots = output.repeat(len(low_rank), 1, 1)
        for slot, own in zip(slots, low_rank, strict=True):
            layer.punica_wrapper.add_expand(
                slot, own, layer.lora_b_stacked, layer.output_slices, add_inputs=True
            )
        return slots
    updates = [
        torch.einsum("kts,tos->kto", part.to(output.dtype), _own(lora_B, layer, len(output)))
        for part, lora_B in zip(low_rank.unbind(1), layer.lora_b_stacked, strict=True)
    ]
    return output + torch.cat(updates, -1)


def _own(stacked: Tensor, layer: Any, num_tokens: int) -> Tensor:
    """Each token's own weights, as vLLM looks them up on a CPU, but once for all slots."""
    adapters = _adapters(layer, num_tokens).clamp_min(0)
    return stacked.squeeze(1).index_select(0, adapters)


def define_operations(block_at: Callable[[str], MixtureFfn]) -> None:
    """Make the operations known to torch; once in a process."""

    def mix_experts(
        x: Tensor, gate_up: Tensor, hidden_size: int, rank: int, place: str
    ) -> tuple[Tensor, Tensor]:
        return block_at(place).mix_experts(x, gate_up)

    def add_update(output: Tensor, rank_space: Tensor, place: str) -> Tensor:
        return block_at(place).add_update(output, rank_space)

    for operation, shapes in ((mix_experts, _mix_experts_shapes), (add_update, _add_update_shapes)):
        name = operation.__name__
        _OPERATIONS.define(name + torch.library.infer_schema(operation, mutates_args=()))
        _OPERATIONS.impl(name, operation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"loraloom::{name}", shapes, lib=_OPERATIONS)


def _mix_experts_shapes(
    x: Tensor, gate_up: Tensor, hidden_size: int, rank: int, place: str
) -> tuple[Tensor, Tensor]:
    hidden = gate_up.new_empty(len(x), hidden_size)
    return hidden, x.new_empty(len(x), rank, dtype=torch.float32)


def _add_update_shapes(output: Tensor, rank_space: Tensor, place: str) -> Tensor:
    return torch.empty_like(output)
