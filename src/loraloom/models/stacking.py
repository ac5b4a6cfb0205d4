"""Forwards of a few tokens without gradients: like adapters' rows are computed together.

Axes: B batch, L sequence, T token rows (B·L), N adapters of a cohort, n token rows of each.

Every product of a cohort (see cohorts.py) is one batched product over its N adapters.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import SegmentTokens
from loraloom.models.autocast import outside_autocast
from loraloom.models.cohorts import Cohort, Recorder, StackedPlan
from loraloom.ops.expert_ffn import Activation
from loraloom.ops.low_rank import decompose
from loraloom.ops.stacked import StackedInput

_Update = tuple[StackedInput | None, Tensor]


class StackedForward:
    """A forward whose adapters are computed by cohorts."""

    def __init__(self, plan: StackedPlan, recorder: Recorder):
        self._plan = plan
        self._recorder = recorder
        self._shared: tuple[Tensor, int, tuple[str, ...], Sequence[_Update]] | None = None

    def project(
        self,
        layer: int,
        group: tuple[str, ...],
        name: str,
        hidden_states: Tensor,
        output: Tensor,
        linear: nn.Module,
    ) -> Tensor:
        """Adapt an attention projection's output, [B, L, O], in place where that is possible."""
        rows = output.view(-1, output.shape[-1])
        updates = self._updates(layer, group, hidden_states, output.dtype)
        for cohort, (stack, update) in zip(self._plan.cohorts, updates, strict=True):
            if stack is None or name not in stack.columns:
                continue
            rows = _updated(rows, update[:, stack.columns[name]], cohort, stack, name, linear)
        return rows.view(output.shape)

    def ffn(
        self,
        layer: int,
        hidden_states: Tensor,
        base_inputs: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        act: Activation,
        down: nn.Module,
    ) -> Tensor:
        """Compute an FFN block; see FfnBlock.

        Rows are put in the cohorts' order in front of the base's projections, and back behind them.
        """
        plan = self._plan
        cohorts = plan.cohorts[: plan.num_in_ffn]
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        if plan.ffn_take is not None:
            rows = rows.index_select(0, plan.ffn_take)
        gate, up = base_inputs(rows)
        sizes = [cohort.size for cohort in cohorts]
        sizes += [len(rows) - sum(sizes)] * (len(rows) > sum(sizes))
        parts = [_split(values, sizes) for values in (rows, gate, up)]
        with outside_autocast(gate):
            steps = [
                cohort.stack.ffn(layer).step(
                    *(None if own is None else cohort.side_by_side(own) for own in inputs),
                    act,
                    partial(self._tokens, cohort, layer),
                )
                for cohort, *inputs in zip(cohorts, *parts, strict=False)
            ]
        hidden = [rows for rows, _ in steps]
        if len(sizes) > len(cohorts):
            _, gate, up = (own[-1] for own in parts)
            hidden.append(act(gate) if up is None else act(gate) * up)
        output = down(hidden[0] if len(hidden) == 1 else torch.cat(hidden))
        base_outputs = _split(output, [len(part) for part in hidden])
        with outside_autocast(gate):
            outputs = [finish(part) for (_, finish), part in zip(steps, base_outputs, strict=False)]
        outputs += base_outputs[len(steps) :]
        is_in_place = all(map(operator.is_, outputs, base_outputs))
        rows = output if is_in_place else torch.cat(outputs)
        if plan.ffn_put is not None:
            rows = rows.index_select(0, plan.ffn_put)
        return rows.view(*hidden_states.shape[:-1], rows.shape[-1])

    def _tokens(self, cohort: Cohort, layer: int, index: int) -> SegmentTokens:
        return cohort.tokens(layer, index, self._recorder, self._plan.device)

    def _updates(
        self, layer: int, group: tuple[str, ...], hidden_states: Tensor, dtype: torch.dtype
    ) -> Sequence[_Update]:
        """Every cohort's update of projections with one input, [T, ΣO]; kept for the next one."""
        if self._shared is not None:
            known_states, known_layer, known_group, updates = self._shared
            if known_states is hidden_states and known_layer == layer and known_group is group:
                return updates
        rows = hidden_states.view(-1, hidden_states.shape[-1]).to(dtype)
        updates = []
        for cohort in self._plan.cohorts:
            stack = cohort.stack.attention(layer, group)
            update = rows
            if stack is not None:
                tokens = partial(self._tokens, cohort, layer)
                update = cohort.scatter(stack.update(cohort.gather(rows), tokens))
            updates.append((stack, update))
        self._shared = (hidden_states, layer, group, updates)
        return updates


def _updated(
    output: Tensor,
    update: Tensor,
    cohort: Cohort,
    stack: StackedInput,
    name: str,
    linear: nn.Module,
) -> Tensor:
    """Add an update to the base's output, or rebuild the cohort's rows by DoRA's formula."""
    row_scale = stack.row_scales.get(name)
    if row_scale is None:
        return output.add_(update)
    factors = row_scale.expand(-1, cohort.width, -1)
    factors = cohort.scatter(factors, blank=1.0)
    bias: Any = linear.bias
    return decompose(output, update, factors, None if bias is None else bias.to(output.dtype))


def _split(rows: Tensor | None, sizes: Sequence[int]) -> Sequence[Any]:
    """Cut rows into parts; views cost as much as small products do."""
    if rows is None or len(sizes) == 1:
        return [rows] * len(sizes)
    return rows.split(list(sizes))
