"""Settings of LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from loraloom.adapters.config import LowRankConfig
from loraloom.adapters.keys import Shape, TensorKey

if TYPE_CHECKING:
    import torch

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseInfo, BaseLayer
    from loraloom.adapters.files import AdapterFiles


class LoraConfig(LowRankConfig):
    """Low-rank adaptation: y = Wx + b + s·B(A(dropout(x))).

    Source: Hu et al. 2021, LoRA, arXiv:2106.09685; Liu et al. 2024, DoRA, arXiv:2402.09353;
    Kalajdzievski 2023, rsLoRA, arXiv:2312.03732.
    """

    peft_type = "LORA"
    layout = "peft"
    formula = "y = Wx + b + s·B(Ax)"
    aliases: ClassVar = {
        "dora": "method: lora with weight_decomposition: true",
        "rslora": "method: lora with rank_stabilized: true",
        "lora+": "method: lora and train.loraplus_lr_ratio",
        "loraplus": "method: lora and train.loraplus_lr_ratio",
    }

    method: Literal["lora"] = "lora"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Low-rank adaptation of linear layers."""
    weight_decomposition: bool = False
    """Train the norm of each output row apart from its direction: DoRA, or MixDoRA in a mixture."""

    @property
    def title(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """LoRA or DoRA."""
        return "DoRA" if self.weight_decomposition else "LoRA"

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.lora.weights import LoraProjection
        from loraloom.adapters.low_rank import LowRankAdapter

        return LowRankAdapter.of(
            name, self, base_layers, lambda base, _: LoraProjection(base, self, None, dtype, seed)
        )

    def projection_shapes(
        self, place: TensorKey, out_features: int, in_features: int
    ) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig."""
        yield replace(place, part="lora_A"), (self.rank, in_features)
        yield replace(place, part="lora_B"), (out_features, self.rank)
        if self.weight_decomposition:
            yield replace(place, part="magnitude"), (out_features,)

    def file_fields(self, base: BaseInfo) -> dict[str, Any]:
        """See AdapterConfig."""
        from loraloom.adapters.lora.files import peft_fields

        return peft_fields(self, base)

    @classmethod
    def settings_of(cls, files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
        """See AdapterConfig."""
        from loraloom.adapters.lora.files import settings_of

        return settings_of(files, projections)
