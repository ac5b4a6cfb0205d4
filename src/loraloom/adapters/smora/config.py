"""Settings of SMoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from loraloom.adapters.config import AdapterConfig, LowRankConfig, RouterLossConfig, Targets
from loraloom.adapters.keys import Shape, TensorKey
from loraloom.config.fields import CheckInfo

if TYPE_CHECKING:
    import torch

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseLayer


class SmoraConfig(RouterLossConfig, LowRankConfig):
    """A LoRA whose ranks are experts: y = Wx + s·B(g ∘ A(x)), g from a router over the ranks.

    The paper balances ranks by a bias on the choice that is moved outside of the gradient; here
    the load-balance loss does it, as in all mixtures.

    Source: Zhao et al. 2025, SMoRA, arXiv:2501.15103.
    """

    peft_type = "SMORA"
    title = "SMoRA"
    formula = "y = Wx + s·B(g ∘ Ax), g = softmax(Rx) over the top_k ranks"
    experts_have_tensors = False

    method: Literal["smora"] = "smora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """A LoRA whose ranks are experts."""
    rank: int = Field(default=64, ge=1, le=2**10)
    """Ranks of each projection, every one an expert."""
    top_k: int = Field(default=8, ge=1, validate_default=True)
    """Ranks that each token uses."""

    @field_validator("top_k")
    @classmethod
    def _check_top_k(cls, top_k: int, info: CheckInfo) -> int:
        rank = info.data.get("rank", top_k)
        if top_k > rank:
            raise ValueError(f"top_k must be in [1, rank={rank}], got {top_k}")
        return top_k

    @property
    def experts_per_token(self) -> int:
        """See AdapterConfig."""
        return self.top_k

    @property
    def experts_per_router(self) -> int:
        """See AdapterConfig."""
        return self.rank

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.low_rank import LowRankAdapter
        from loraloom.adapters.smora.weights import SmoraProjection

        return LowRankAdapter.of(
            name, self, base_layers, lambda base, _: SmoraProjection(base, self, dtype, seed)
        )

    def projection_shapes(
        self, place: TensorKey, out_features: int, in_features: int
    ) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig."""
        yield replace(place, part="lora_A"), (self.rank, in_features)
        yield replace(place, part="lora_B"), (out_features, self.rank)
        yield replace(place, part="router"), (self.rank, in_features)

    def combined(self, others: Sequence[AdapterConfig], targets: Targets) -> AdapterConfig:
        """See AdapterConfig; routers choose among the ranks as they are."""
        return AdapterConfig.combined(self, others, targets)

    def summary(self) -> dict[str, Any]:
        """See AdapterConfig."""
        return super().summary() | {"top_k": self.top_k}

    def card_lines(self) -> list[str]:
        """See AdapterConfig."""
        return [*super().card_lines(), f"{self.top_k} of the {self.rank} ranks for each token"]

    def description(self) -> dict[str, Any]:
        """See AdapterConfig; experts are ranks."""
        own = self.model_dump(include={"alpha", "dropout", "top_k"})
        sizes = {"num_experts": self.rank, "rank": 1, "routing": f"top-{self.top_k}"}
        return super().description() | {"experts": sizes | own}
