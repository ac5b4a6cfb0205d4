"""Settings of VeRA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from loraloom.adapters.config import MAX_NUMBER, MAX_RANK, AdapterConfig
from loraloom.adapters.keys import Shape, TensorKey, target_pattern, target_projections
from loraloom.errors import shown

if TYPE_CHECKING:
    import torch

    from loraloom.adapters.adapter import Adapter
    from loraloom.adapters.base import BaseInfo, BaseLayer
    from loraloom.adapters.files import AdapterFiles


class VeraConfig(AdapterConfig):
    """Vector-based random matrix adaptation: y = Wx + bias + b ∘ B(d ∘ A(dropout(x))).

    Source: Kopiczko et al. 2023, VeRA, arXiv:2310.11454, eq. 2; files as in peft 0.21.2,
    `peft/tuners/vera/`.
    """

    peft_type = "VERA"
    layout = "peft"
    title = "VeRA"
    trains_B = False
    formula = "y = Wx + b ∘ B(d ∘ Ax), A and B frozen"
    file_parts: ClassVar = {
        "lambda_b": "vera_lambda_b",
        "lambda_d": "vera_lambda_d",
        "vera_A": "vera_A",
        "vera_B": "vera_B",
    }

    method: Literal["vera"] = "vera"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Two trained vectors around frozen random matrices."""
    rank: int = Field(default=256, ge=1, le=MAX_RANK)
    """Rows of A and length of d."""
    d_initial: float = Field(default=0.1, ge=-MAX_NUMBER, le=MAX_NUMBER)
    """Initial value of d; b starts at 0."""
    projection_seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of A and B, as PEFT's projection_prng_key."""
    save_projection: bool = True
    """Save A and B too, so that the files don't depend on the random generator."""

    @field_validator("trainable_token_indices")
    @classmethod
    def _check_no_tokens(cls, tokens: Any) -> Any:
        if tokens:
            raise ValueError(
                "trainable_token_indices must be unset, as PEFT's files of a VeRA have no place "
                f"for them, got {shown(tokens)}; train embed_tokens by modules_to_save"
            )
        return tokens

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        """See AdapterConfig."""
        from loraloom.adapters.low_rank import LowRankAdapter
        from loraloom.adapters.vera.weights import SharedProjections, VeraProjection

        shared = SharedProjections(self, base_layers, dtype)

        def build(base, layer):
            return VeraProjection(base, self, shared, dtype)

        return LowRankAdapter.of(name, self, base_layers, build, shared)

    def projection_shapes(
        self, place: TensorKey, out_features: int, in_features: int
    ) -> Iterator[tuple[TensorKey, Shape]]:
        """See AdapterConfig."""
        yield replace(place, part="lambda_b"), (out_features,)
        yield replace(place, part="lambda_d"), (self.rank,)

    def tensor_shapes(self, base: BaseInfo) -> dict[str, Shape]:
        """See AdapterConfig."""
        shapes = super().tensor_shapes(base)
        if self.save_projection:
            sizes = [base.shapes[path] for path in target_projections(self.target_modules, base)]
            shapes["shared.vera_A"] = (self.rank, max(size[1] for size in sizes))
            shapes["shared.vera_B"] = (max(size[0] for size in sizes), self.rank)
        return shapes

    def summary(self) -> dict[str, Any]:
        """See AdapterConfig."""
        return super().summary() | {"projection_seed": self.projection_seed}

    def file_fields(self, base: BaseInfo) -> dict[str, Any]:
        """See AdapterConfig."""
        targets: Any = list(self.known_targets(base))
        if not base.has_own_names:
            targets = target_pattern(self.target_modules, base)
        return {
            "r": self.rank,
            "vera_dropout": self.dropout,
            "d_initial": self.d_initial,
            "projection_prng_key": self.projection_seed,
            "save_projection": self.save_projection,
            "target_modules": targets,
            "bias": "none",
        }

    @classmethod
    def settings_of(cls, files: AdapterFiles, projections: Sequence[str]) -> dict[str, Any]:
        """See AdapterConfig."""
        layers = files.config.get("layers_to_transform")
        if layers:
            raise files.error(f"`layers_to_transform` must be unset, got {shown(layers)}")
        return {
            "rank": files.required("r"),
            "dropout": files.config.get("vera_dropout", 0.0),
            "d_initial": files.config.get("d_initial", 0.1),
            "projection_seed": files.config.get("projection_prng_key", 0),
            "save_projection": "base_model.vera_A" in files.tensors,
            "target_modules": files.targets(projections),
        }
