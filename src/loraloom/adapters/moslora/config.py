"""Settings of MoSLoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from loraloom.adapters.config import LowRankConfig
from loraloom.adapters.keys import Shape, TensorKey

if TYPE_CHECKING:
    import torch

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseLayer


class MosLoraConfig(LowRankConfig):
    """Mixture of subspaces: y = Wx + bias + scaling · B M A(dropout(x)).

    Source: Wu et al. 2024, Mixture-of-Subspaces in Low-Rank Adaptation, arXiv:2406.11909.
    """

    peft_type = "MOSLORA"
    title = "MoSLoRA"
    formula = "y = Wx + scaling · B M A x"

    method: Literal["moslora"] = "moslora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """A LoRA with a trained mixer M between A and B."""
    mixer_init: Literal["kaiming", "orthogonal"] = "kaiming"
    """How M starts: Kaiming uniform with a = sqrt(5), or a random orthogonal matrix."""

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.low_rank import LowRankAdapter
        from loraloom.adapters.moslora.weights import MosLoraProjection

        return LowRankAdapter.of(
            name, self, base_layers, lambda base, _: MosLoraProjection(base, self, dtype, seed)
        )

    def projection_shapes(
        self, place: TensorKey, out_features: int, in_features: int
    ) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig."""
        yield replace(place, part="lora_A"), (self.rank, in_features)
        yield replace(place, part="mixer"), (self.rank, self.rank)
        yield replace(place, part="lora_B"), (out_features, self.rank)
