"""Weights of like adapters side by side, for steps of a few tokens without gradients.

Adapters are alike when their tensors have the same shapes and roles; their values, scalings and
seeds may differ.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from loraloom.adapters.adapter import Adapter, ffn_weights, input_group
from loraloom.adapters.low_rank import LowRank
from loraloom.config.adapter import MixLoraConfig
from loraloom.ops.low_rank import UpProjection
from loraloom.ops.stacked import StackedFfn, StackedInput, StackedSide


def likeness(adapter: Adapter) -> Hashable:
    """Return what two adapters have in common if they can be stacked."""
    config = adapter.config
    modules = adapter.layers[0].named_modules()
    targets = tuple(name for name, module in modules if isinstance(module, LowRank))
    if not isinstance(config, MixLoraConfig):
        return config.method, config.rank, config.weight_decomposition, targets
    experts = (config.expert_config.rank, config.num_experts, config.top_k)
    return config.method, config.rank, config.weight_decomposition, targets, experts


class Stack:
    """Like adapters' weights in compute form, layer by layer, made when first asked for.

    Args:
        adapters: One or more, all alike.
        dtype: Of the products.
    """

    def __init__(self, adapters: Sequence[Adapter], dtype: torch.dtype):
        self._adapters = adapters
        self._dtype = dtype
        self._inputs: dict[tuple[int, str], StackedInput | None] = {}
        self._ffns: dict[int, StackedFfn] = {}

    def attention(self, layer: int, names: Sequence[str]) -> StackedInput | None:
        """Return the attention projections that share an input; None if none is adapted."""
        key = (layer, names[0])
        if key not in self._inputs:
            self._inputs[key] = self._build_input(layer, names)
        return self._inputs[key]

    def ffn(self, layer: int) -> StackedFfn:
        """Return an FFN block's weights."""
        if layer not in self._ffns:
            self._ffns[layer] = self._build_ffn(layer)
        return self._ffns[layer]

    def _build_input(self, layer: int, names: Sequence[str]) -> StackedInput | None:
        base = self._adapters[0].base_layers[layer]
        blocks = [adapter.block(layer, base.attention_block) for adapter in self._adapters]
        present = [name for name in names if name in blocks[0]]
        if not present:
            return None
        parts = [input_group([block[name] for name in present], self._dtype) for block in blocks]
        sizes = {name: side.B.shape[1] for name, side in parts[0].projections.items()}
        columns, stop = {}, 0
        for name, size in sizes.items():
            columns[name] = slice(stop, stop + size)
            stop += size
        B = parts[0].A.new_zeros(len(parts), len(parts[0].A), stop)
        for entry, part in zip(B, parts, strict=True):
            for name, side in part.projections.items():
                entry[side.columns, columns[name]] = side.B
        scales = {
            name: _stack_scales([part.projections[name].row_scale for part in parts])
            for name in sizes
        }
        return StackedInput(
            A=torch.stack([part.A for part in parts]).transpose(1, 2),
            B=B,
            columns=columns,
            row_scales={name: scale for name, scale in scales.items() if scale is not None},
        )

    def _build_ffn(self, layer: int) -> StackedFfn:
        base = self._adapters[0].base_layers[layer]
        parts = [
            ffn_weights(adapter.block(layer, base.ffn_block), base, self._dtype)
            for adapter in self._adapters
        ]
        first, config = parts[0], self._adapters[0].config
        is_mixture = isinstance(config, MixLoraConfig)
        inputs = [part.input_A for part in parts if part.input_A is not None]
        down = [part.down for part in parts if part.down is not None]
        device = first.any_tensor().device
        experts = torch.eye(first.num_experts, dtype=self._dtype, device=device)
        return StackedFfn(
            input_A=_stack_transposed(inputs),
            gate=_stack_sides([part.gate for part in parts]),
            up=_stack_sides([part.up for part in parts]),
            down_A=_stack_transposed([part.A for part in down]),
            down_B=torch.stack([part.B for part in down]) if down else None,
            down_row_scale=_stack_scales([part.row_scale for part in down]),
            down_bias=first.down_bias,
            router=torch.stack([a.router(layer).detach().T for a in self._adapters])
            if is_mixture
            else None,
            expert_columns=experts.repeat_interleave(first.rank, dim=1),
            top_k=config.top_k if is_mixture else 1,
            apart=first.apart,
        )


def _stack_transposed(matrices: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(matrices)).transpose(1, 2) if matrices else None


def _stack_scales(scales: Sequence[Tensor | None]) -> Tensor | None:
    """Put DoRA's factors of all adapters' experts one below the other, [N·E, O]."""
    present = [scale for scale in scales if scale is not None]
    return torch.cat(present) if present else None


def _stack_sides(sides: Sequence[UpProjection | None]) -> StackedSide | None:
    first = sides[0]
    if first is None:
        return None
    present = [side for side in sides if side is not None]
    return StackedSide(
        columns=first.columns,
        B=torch.stack([side.B for side in present]),
        row_scale=_stack_scales([side.row_scale for side in present]),
        bias=first.bias,
    )
