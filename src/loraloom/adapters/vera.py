"""VeRA: frozen random A and B that all projections share, and two trained vectors on each.

`b ∘ B(d ∘ Ax)` is the LoRA with A and `diag(b) B diag(d)`, so all forms of a LoRA serve.

Axes: I in_features, O out_features, R rank.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from loraloom.adapters.contract import MAX_NUMBER, MAX_RANK, Adapter, AdapterConfig, Adjustable
from loraloom.adapters.low_rank import LowRankAdapter, projection_layers
from loraloom.adapters.projection import Projection
from loraloom.adapters.tensor_names import Weights
from loraloom.base.blocks import BaseLayer, BaseProjection, Block


class VeraConfig(AdapterConfig):
    """Vector-based random matrix adaptation: y = Wx + bias + b ∘ B(d ∘ A(dropout(x))).

    Source: Kopiczko et al. 2023, VeRA, arXiv:2310.11454, eq. 2; files as in peft 0.21.2,
    `peft/tuners/vera/`.
    """

    peft_type = "VERA"
    layout = "peft"
    title = "VeRA"
    formula = "y = Wx + b ∘ B(d ∘ Ax), A and B frozen"

    method: Literal["vera"] = "vera"
    """Two trained vectors around frozen random matrices."""
    rank: int = Field(default=256, ge=1, le=MAX_RANK)
    """Rows of A and length of d."""
    d_initial: Adjustable[float] = Field(default=0.1, ge=-MAX_NUMBER, le=MAX_NUMBER)
    """Initial value of d; b starts at 0."""
    projection_seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of A and B, as PEFT's projection_prng_key."""
    save_projection: bool = True
    """Save A and B too, so that the files don't depend on the random generator."""

    def build(
        self, name: str, base_layers: Sequence[BaseLayer], dtype: torch.dtype, seed: int
    ) -> Adapter:
        shared = SharedProjections(self, base_layers, dtype)

        def build(base: BaseProjection, block: Block) -> Projection:
            return VeraProjection(base, self, shared, dtype)

        layers = projection_layers(self, base_layers, build)
        adapter = LowRankAdapter(name, self, base_layers, layers)
        adapter.add_module("shared", shared)
        return adapter


class SharedProjections(Weights):
    """Frozen A, [R, largest I], and B, [largest O, R]; a projection takes its corner.

    Source: peft 0.21.2, `peft/tuners/vera/model.py`, which draws the same numbers.
    """

    def __init__(self, config: VeraConfig, base_layers: Sequence[BaseLayer], dtype: torch.dtype):
        super().__init__()
        adapted = config.adapted(base_layers)
        # A before B from one generator, and these bounds: PEFT draws the same numbers.
        generator = torch.Generator().manual_seed(config.projection_seed)
        options: dict[str, Any] = {"dtype": dtype, "device": adapted[0].device}
        in_features = max(projection.in_features for projection in adapted)
        out_features = max(projection.out_features for projection in adapted)
        shapes = {
            "vera_A": (config.rank, in_features),
            "vera_B": (out_features, config.rank),
        }
        for name, shape in shapes.items():
            bound = math.sqrt(6 / shape[1])
            matrix = torch.empty(shape, dtype=torch.float32)
            matrix.uniform_(-bound, bound, generator=generator)
            self.register_buffer(name, matrix.to(**options))
        self._saved = config.save_projection

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        if self._saved:
            yield "shared.vera_A", self.get_buffer("vera_A")
            yield "shared.vera_B", self.get_buffer("vera_B")


class VeraProjection(Projection):
    """d, [R], and b, [O], on a projection."""

    def __init__(
        self,
        base: BaseProjection,
        config: VeraConfig,
        shared: SharedProjections,
        dtype: torch.dtype,
    ):
        super().__init__(base)
        options: dict[str, Any] = {"dtype": dtype, "device": base.device}
        self.lambda_b = nn.Parameter(torch.zeros(base.out_features, **options))
        self.lambda_d = nn.Parameter(torch.full((config.rank,), config.d_initial, **options))
        # In a tuple, which torch doesn't look into: the adapter owns it, and no projection does.
        self._shared = (shared,)

    @property
    def num_columns(self) -> int:
        return len(self.lambda_d)

    def compute_A(self, dtype: torch.dtype) -> Tensor:
        matrix = self._shared[0].get_buffer("vera_A")
        return matrix[:, : self.base.in_features].to(dtype)  # (R, I)

    def compute_B(self, dtype: torch.dtype) -> Tensor:
        matrix = self._shared[0].get_buffer("vera_B")
        corner = matrix[: self.base.out_features].T  # (R, O)
        return (self.lambda_d.unsqueeze(1) * corner * self.lambda_b).to(dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield f"{self.key}.lambda_b", self.lambda_b.detach()
        yield f"{self.key}.lambda_d", self.lambda_d.detach()
