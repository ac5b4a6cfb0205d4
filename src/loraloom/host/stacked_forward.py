"""Small forwards of many like adapters, computed cohort by cohort as a plan says.

Axes: B batch, L sequence, T token rows (B·L), N adapters of a cohort, n token rows of each.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.adapters.segment import SegmentTokens
from loraloom.base.blocks import Block
from loraloom.host.prepared_weights import (
    Cohort,
    ProjectionSite,
    Record,
    StackedPlan,
    outside_autocast,
    recorder_of,
)
from loraloom.ops.expert_rows import ExpertUpdate
from loraloom.ops.low_rank import decompose
from loraloom.ops.stacked import StackedInput


class StackedForward:
    """A forward whose adapters are computed by cohorts."""

    def __init__(self, plan: StackedPlan, record: Record | None):
        self._plan = plan
        self._record = record
        self._shared: tuple[Any, ...] = (None,)

    def project(
        self, site: ProjectionSite, hidden_states: Tensor, output: Tensor, linear: nn.Module
    ) -> Tensor:
        """Adapt a projection's output, [B, L, O], in place where that is possible."""
        rows = output.view(-1, output.shape[-1])
        updates = self._updates(site, hidden_states, output.dtype)
        for cohort, (stack, update) in zip(self._plan.cohorts, updates, strict=True):
            if stack is None or site.name not in stack.columns:
                continue
            update = update[:, stack.columns[site.name]]
            row_scale = stack.row_scales.get(site.name)
            if row_scale is None:
                rows = rows.add_(update)
            else:  # DoRA's formula rebuilds the cohort's rows
                factors = cohort.scatter(row_scale.expand(-1, cohort.width, -1), blank=1.0)
                bias: Any = linear.bias
                if bias is not None:
                    bias = bias.to(output.dtype)
                rows = decompose(rows, update, factors, bias)
        return rows.view(output.shape)

    def ffn(
        self,
        block: Block,
        hidden_states: Tensor,
        base_outputs: Callable[[Tensor], Sequence[Tensor]],
        down: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Compute an FFN block; see FfnBlock.

        Rows are put in the cohorts' order in front of the base's projections, and back behind them.
        """
        plan = self._plan
        cohorts = plan.cohorts[: plan.num_in_ffn]
        rows = hidden_states.view(-1, hidden_states.shape[-1])
        if plan.ffn_take is not None:
            rows = rows.index_select(0, plan.ffn_take)
        outputs = base_outputs(rows)
        sizes = [len(cohort.counts) * cohort.width for cohort in cohorts]
        num_left = len(rows) - sum(sizes)
        if num_left:
            sizes.append(num_left)
        inputs_by_part = cut_rows(rows, sizes)
        outputs_by_part = list(zip(*(cut_rows(output, sizes) for output in outputs), strict=True))
        steps = []
        with outside_autocast(outputs[0]):
            for number, cohort in enumerate(cohorts):
                step = cohort.part(block).step(
                    cohort.side_by_side(inputs_by_part[number]),
                    [cohort.side_by_side(output) for output in outputs_by_part[number]],
                    block.gating,
                    partial(self._tokens, cohort, block.layer),
                )
                steps.append(step)
        hidden = [rows for rows, _ in steps]
        if num_left:
            hidden.append(block.gating(*outputs_by_part[-1]))
        output = down(join_rows(hidden))
        base_outputs_of_parts = cut_rows(output, [len(rows) for rows in hidden])
        finished = list(base_outputs_of_parts)
        with outside_autocast(outputs[0]):
            for number, (_, finish) in enumerate(steps):
                finished[number] = finish(base_outputs_of_parts[number])
        # most steps write to the base's rows
        is_in_place = all(map(operator.is_, finished, base_outputs_of_parts))
        rows = output if is_in_place else torch.cat(finished)
        if plan.ffn_put is not None:
            rows = rows.index_select(0, plan.ffn_put)
        return rows.view(*hidden_states.shape[:-1], rows.shape[-1])

    def expert_updates(self, block: Block) -> list[ExpertUpdate]:
        """Describe the cohorts' rows to a block of stacked experts."""
        updates = []
        for cohort in self._plan.cohorts:
            weights = cohort.part(block)
            if weights is not None:
                tokens, entries = cohort.tokens_and_entries(self._plan.device)
                update = ExpertUpdate(
                    weights=weights.flat(),
                    tokens=tokens,
                    entries=entries,
                    num_entries=len(cohort.counts),
                )
                updates.append(update)
        return updates

    def _tokens(self, cohort: Cohort, layer: int, index: int) -> SegmentTokens:
        """Describe an adapter's rows in a layer; padding at their end is not real."""
        count = cohort.counts[index]
        adapter, _ = cohort.stack.adapters[cohort.entries][index]
        record = None
        if count:
            record = recorder_of(self._record, adapter)
        real_index = None
        if count < cohort.width and record is not None:
            real_index = torch.arange(count, device=self._plan.device)
        return SegmentTokens(layer, None, real_index, None, record)

    def _updates(
        self, site: ProjectionSite, hidden_states: Tensor, dtype: torch.dtype
    ) -> Sequence[tuple[StackedInput | None, Tensor]]:
        """Every cohort's update of projections with one input, [T, ΣO]; kept for the next one."""
        key = (site.block, site.group)
        if self._shared[0] is hidden_states and self._shared[1] == key:
            return self._shared[2]
        rows = hidden_states.reshape(-1, hidden_states.shape[-1]).to(dtype)
        updates = []
        for cohort in self._plan.cohorts:
            stack = cohort.part(site.block, site.group)
            update = rows
            if stack is not None:
                if cohort.take is not None:
                    update = rows.index_select(0, cohort.take)
                inputs = cohort.side_by_side(update)
                tokens = partial(self._tokens, cohort, site.block.layer)
                update = cohort.scatter(stack.update(inputs, tokens))
            updates.append((stack, update))
        self._shared = (hidden_states, key, updates)
        return updates


def cut_rows(rows: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Cut rows into parts; views cost as much as small products do."""
    if len(sizes) == 1:
        return [rows]
    return rows.split(list(sizes))


def join_rows(parts: Sequence[Tensor]) -> Tensor:
    """Join what `cut_rows` cut."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(list(parts))
