"""Settings of HydraLoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from loraloom.adapters.config import ExpertCount, MixtureConfig
from loraloom.adapters.keys import Shape, TensorKey

if TYPE_CHECKING:
    import torch

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseLayer


class HydraLoraConfig(MixtureConfig):
    """One A, several B, all mixed by a router: y = Wx + s·Σ_e softmax(router(x))_e B_e(A(x)).

    Source: Tian et al. 2024, HydraLoRA, arXiv:2404.19245, eq. 4-5.
    """

    peft_type = "HYDRALORA"
    title = "HydraLoRA"
    formula = "y = Wx + s·Σ_e ω_e(x) B_e(Ax), ω = softmax(Rx)"

    method: Literal["hydralora"] = "hydralora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """A shared A and a mixture of B on each linear layer."""
    num_experts: ExpertCount = 3  # pyright: ignore[reportIncompatibleVariableOverride]
    """Matrices B of each projection."""

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.hydralora.weights import HydraLoraProjection
        from loraloom.adapters.low_rank import LowRankAdapter

        return LowRankAdapter.of(
            name, self, base_layers, lambda base, _: HydraLoraProjection(base, self, dtype, seed)
        )

    def projection_shapes(
        self, place: TensorKey, out_features: int, in_features: int
    ) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig."""
        yield replace(place, part="lora_A"), (self.rank, in_features)
        for expert in range(self.num_experts):
            yield replace(place, part="lora_B", expert=expert), (out_features, self.rank)
        yield replace(place, part="router"), (self.num_experts, in_features)

    def card_lines(self) -> list[str]:
        """See AdapterConfig."""
        return [*super().card_lines(), f"{self.num_experts} B to each A, all mixed by a router"]
