"""MoLA: a mixture of LoRA experts on each adapted projection, more or fewer by layer."""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from loraloom.adapters.contract import Adjustable, Projection
from loraloom.adapters.experts import ExpertCount, RoutedProjection, RoutingConfig
from loraloom.base.blocks import BaseLayer, BaseProjection, Block
from loraloom.errors import AdapterError


class MolaConfig(RoutingConfig):
    """A router and several LoRA experts on each linear layer: y = Wx + s·Σ_j g_j B_e(j)(A_e(j)(x)).

    Source: Gao et al. 2024, MoLA, arXiv:2402.08562, eq. 2-4; files as in moe-peft 2.0.2.
    """

    peft_type = "MOLA"
    layout = "reference"
    title = "MoLA"
    formula = "y = Wx + s·Σ_j g_j B_e(j)(A_e(j) x)"

    method: Literal["mola"] = "mola"
    """Mixture of LoRA experts on each linear layer."""
    num_experts: ExpertCount | tuple[ExpertCount, ...] = 8
    """Experts of each projection: a number, or a list with one for each layer."""
    router_loss_scope: Adjustable[Literal["pooled", "per_layer"]] = "per_layer"
    """The mean of each router's load-balance loss, or the load over all routers together (pooled),
    in which routers that have collapsed to different experts cost nothing."""

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        is_same = isinstance(self.num_experts, int) or len({*self.num_experts}) <= 1
        if not is_same and self.router_loss_scope == "pooled":
            yield (
                "router_loss_scope must be per_layer where num_experts differs by layer, got "
                "pooled; remove router_loss_scope, or set one number of experts"
            )

    def check_fits(self, base_layers: Sequence[BaseLayer]) -> None:
        super().check_fits(base_layers)
        if not isinstance(self.num_experts, int) and len(self.num_experts) != len(base_layers):
            raise AdapterError(
                f"num_experts must have a number for each of the base model's {len(base_layers)} "
                f"layers, got {len(self.num_experts)}"
            )

    def projection(
        self, base: BaseProjection, block: Block, dtype: torch.dtype, seed: int
    ) -> Projection:
        count = self.num_experts
        if not isinstance(count, int):
            count = count[block.layer]
        return RoutedProjection(base, self, count, self.route, dtype, seed, self.expert_capacity)
