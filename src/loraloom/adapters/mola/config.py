"""Settings of MoLA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from loraloom.adapters.config import ExpertCount, RoutingConfig
from loraloom.adapters.keys import Shape, TensorKey, routed_shapes
from loraloom.adapters.lora.config import LoraConfig
from loraloom.adapters.lora.files import lora_settings
from loraloom.adapters.reference import lora_fault, shared_fields
from loraloom.errors import AdapterError

if TYPE_CHECKING:
    import torch

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseInfo, BaseLayer
    from loraloom.adapters.files import AdapterFiles

_OWN_SETTINGS = {
    "init",
    "routing",
    "top_p",
    "temperature",
    "expert_capacity",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_loss_scope",
}
"""What the reference has no field for, under `"loraloom": {"adapter": …}`."""


class MolaConfig(RoutingConfig):
    """A router and several LoRA experts on each linear layer: y = Wx + s·Σ_j g_j B_e(j)(A_e(j)(x)).

    Source: Gao et al. 2024, MoLA, arXiv:2402.08562, eq. 2-4; files as in moe-peft 2.0.2.
    """

    peft_type = "MOLA"
    layout = "reference"
    title = "MoLA"
    formula = "y = Wx + s·Σ_j g_j B_e(j)(A_e(j) x)"

    method: Literal["mola"] = "mola"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Mixture of LoRA experts on each linear layer."""
    num_experts: ExpertCount | tuple[ExpertCount, ...] = 8  # pyright: ignore[reportIncompatibleVariableOverride]
    """Experts of each projection: a number, or a list with one for each layer."""
    router_loss_scope: Literal["pooled", "per_layer"] = "per_layer"
    """The mean of each router's load-balance loss, or the load over all routers together (pooled),
    in which routers that have collapsed to different experts cost nothing."""

    @model_validator(mode="after")
    def _check_scope(self) -> MolaConfig:
        counts = {self.num_experts} if isinstance(self.num_experts, int) else set(self.num_experts)
        if len(counts) > 1 and self.router_loss_scope == "pooled":
            raise ValueError(
                "router_loss_scope must be per_layer where num_experts differs by layer, got "
                "pooled; leave it out, or drop the list"
            )
        return self

    def experts_of(self, layer: int) -> int:
        """How many experts a projection of a layer has."""
        return self.num_experts if isinstance(self.num_experts, int) else self.num_experts[layer]

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.low_rank import LowRankAdapter
        from loraloom.adapters.routed import RoutedProjection

        self._check_layers(len(base_layers))
        route = self.route
        capacity = self.expert_capacity

        def build(base, layer):
            num_experts = self.experts_of(layer.index)
            return RoutedProjection(base, self, num_experts, route, dtype, seed, capacity)

        return LowRankAdapter.of(name, self, base_layers, build)

    def projection_shapes(
        self, place: TensorKey, out_features: int, in_features: int
    ) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig."""
        num_experts = self.experts_of(place.layer)
        return routed_shapes(place, out_features, in_features, num_experts, self.rank)

    def tensor_shapes(self, base: BaseInfo) -> dict[str, Shape]:
        """See AdapterConfig."""
        self._check_layers(base.num_layers)
        return super().tensor_shapes(base)

    def summary(self) -> dict[str, Any]:
        """See AdapterConfig."""
        own = {"routing": self.routing_label, "temperature": self.temperature}
        return super().summary() | own

    def card_lines(self) -> list[str]:
        """See AdapterConfig."""
        counts, per_layer = self.num_experts, self.router_loss_scope == "per_layer"
        text = str(counts) if isinstance(counts, int) else ", ".join(map(str, counts))
        return [
            *super().card_lines(),
            f"{text} experts on each projection, routing {self.routing_label}",
            f"load-balance loss: {self.router_aux_loss_coef:g} times "
            + ("the mean of all routers'" if per_layer else "that of all routers' pooled load"),
        ]

    def file_fields(self, base: BaseInfo) -> dict[str, Any]:
        """See AdapterConfig; a list of experts by layer stands in the field of the number."""
        return {
            **shared_fields(self, base, decomposed=False),
            "routing_strategy": "mola",
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "loraloom": {"adapter": self.model_dump(mode="json", include=_OWN_SETTINGS)},
        }

    def reference_fault(self, base: BaseInfo) -> str | None:
        """See AdapterConfig."""
        if not isinstance(self.num_experts, int):
            return "MoE-PEFT has one number of experts for all layers"
        if self.routing != "top_k":
            return f"MoE-PEFT's MoLA has top-k routing alone, got {self.routing}"
        plain = LoraConfig(rank=self.rank, alpha=self.alpha, target_modules=self.target_modules)
        return lora_fault(plain, base)

    @classmethod
    def settings_of(cls, files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
        """See AdapterConfig."""
        settings = lora_settings(files, projections)
        if settings.pop("weight_decomposition"):
            warnings.warn(
                f"{files.source}: `use_dora` is left out, as MoE-PEFT ignores it in a MoLA's "
                "experts",
                stacklevel=2,
            )
        return {
            **settings,
            "num_experts": files.required("num_experts"),
            "top_k": files.config.get("top_k", 2),
            **files.section("loraloom").get("adapter", {}),
        }

    def _check_layers(self, num_layers: int) -> None:
        if isinstance(self.num_experts, tuple) and len(self.num_experts) != num_layers:
            raise AdapterError(
                f"num_experts must have a number for each of the base model's {num_layers} layers, "
                f"got {len(self.num_experts)}"
            )
