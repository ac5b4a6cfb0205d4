"""Settings of LoRAMoE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from loraloom.adapters.config import MAX_NUMBER, ExpertCount, MixtureConfig
from loraloom.adapters.keys import Shape, TensorKey, routed_shapes
from loraloom.adapters.lora.config import DecomposedConfig
from loraloom.adapters.lora.files import lora_settings
from loraloom.adapters.reference import lora_fault, shared_fields, without_experts

if TYPE_CHECKING:
    import torch

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseInfo, BaseLayer
    from loraloom.adapters.files import AdapterFiles

_OWN_SETTINGS = {"init", "balance_coef", "balance_delta"}
"""What the reference has no field for, under `"loraloom": {"adapter": …}`."""


class LoraMoeConfig(MixtureConfig, DecomposedConfig):
    """LoRA experts on each FFN projection, all mixed by a router; plain LoRA on attention.

    With weight decomposition the LoRA on attention is a DoRA; experts have none.

    Source: Dou et al. 2023, LoRAMoE, arXiv:2312.09979; files as in moe-peft 2.0.2.
    """

    adds_up_over_ranks = False
    peft_type = "LORAMOE"
    layout = "reference"
    title = "LoRAMoE"  # pyright: ignore
    formula = "y = Wx + s·Σ_e ω_e(x) B_e(A_e x) in the FFN, ω = softmax(Rx)"

    method: Literal["loramoe"] = "loramoe"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Mixture of LoRA experts on each FFN projection, all used by every token."""
    num_experts: ExpertCount = 6  # pyright: ignore[reportIncompatibleVariableOverride]
    """Experts of each FFN projection."""
    balance_coef: float = Field(default=0.1, ge=0, le=MAX_NUMBER)
    """Weight of the localized balancing constraint, σ²(Z) / μ(Z): Z are the sums of the experts'
    weights in each sample, times 1 + balance_delta where expert and sample are of one group and
    1 - balance_delta elsewhere."""
    balance_delta: float = Field(default=0.1, ge=0, lt=1)
    """How far the two groups of experts are to differ; samples have theirs from `expert_group` of
    their data, and the second half of the experts is group 1."""

    @property
    def has_expert_groups(self) -> bool:
        """See AdapterConfig."""
        return self.balance_coef > 0 and self.balance_delta > 0

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.adapter import check_has_experts
        from loraloom.adapters.loramoe.weights import LoraMoeAdapter, projection_builder

        check_has_experts(self, base_layers[0])
        build = projection_builder(self, dtype, seed)
        return LoraMoeAdapter.of(name, self, base_layers, build)

    def layer_shapes(self, base: BaseInfo, layer: int) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig; FFN projections have a router and experts."""
        for key, shape in super().layer_shapes(base, layer):
            if key.block != base.ffn:
                yield key, shape
            elif key.part == "lora_A":  # once for each projection
                sizes = base.shapes[key.path]
                yield from routed_shapes(replace(key, part=""), *sizes, self.num_experts, self.rank)

    def card_lines(self) -> list[str]:
        """See AdapterConfig."""
        return [*super().card_lines(), f"{self.num_experts} experts on each FFN projection"]

    def file_fields(self, base: BaseInfo) -> dict[str, Any]:
        """See AdapterConfig."""
        return {
            **shared_fields(self, base, decomposed=self.weight_decomposition),
            "routing_strategy": "loramoe",
            "num_experts": self.num_experts,
            "loraloom": {"adapter": self.model_dump(mode="json", include=_OWN_SETTINGS)},
        }

    def reference_fault(self, base: BaseInfo) -> str | None:
        """See AdapterConfig."""
        return lora_fault(self, base)

    @classmethod
    def adopted(cls, files: AdapterFiles) -> AdapterFiles:
        """See AdapterConfig."""
        return without_experts(files, cls)

    @classmethod
    def settings_of(cls, files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
        """See AdapterConfig."""
        return {
            **lora_settings(files, projections),
            "num_experts": files.required("num_experts"),
            **files.section("loraloom").get("adapter", {}),
        }
