"""The weights of an adapter on one projection of the base model, or in place of another module.

Axes: T tokens of one segment, I in_features, O out_features, P columns of the A product, S rows of
B.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters.segment import SegmentTokens
from loraloom.adapters.tensor_names import Weights
from loraloom.base.blocks import BaseProjection


class Projection(Weights):
    """The trained weights on one projection of the base model."""

    def __init__(self, base: BaseProjection):
        super().__init__()
        self.base = base
        self.key = base.key
        self.name = base.name
        self.path = self.key.split(".", 2)[2]  # in its layer: `self_attn.q_proj`, for instance

    @property
    def maps_rank_space(self) -> bool:
        """Whether `between` does anything; what doesn't goes through faster forms."""
        return type(self).between is not Projection.between

    @property
    @abstractmethod
    def num_columns(self) -> int:
        """P."""

    @abstractmethod
    def compute_A(self, dtype: torch.dtype) -> Tensor:
        """A in the products' dtype, [P, I]."""

    @abstractmethod
    def compute_B(self, dtype: torch.dtype) -> Tensor:
        """B times scaling, transposed, in the products' dtype, [S, O]."""

    def row_scale(self) -> Tensor | None:
        """DoRA's factor c of each output row, [1, O] float32 or better; None without."""
        return None

    def between(self, low_rank: Tensor, hidden_states: Tensor, tokens: SegmentTokens) -> Tensor:
        """Go from the A product to what B multiplies.

        Args:
            low_rank: dropout(x) Aᵀ, [T, P].
            hidden_states: x, [T, I].
            tokens: Which of them are real; takes the record of a router.

        Returns:
            [T, S], in the dtype of `low_rank`.
        """
        return low_rank

    @torch.no_grad()
    def merged(self, dtype: torch.dtype, expert: int = 0, num_experts: int = 1) -> Tensor:
        """Compute c ∘ (W + BA) of an expert, [O, I]; on stacks that of all the base's experts."""
        return self._merge_into(self.base.weight.to(dtype), expert, num_experts)

    def _merge_into(self, weight: Tensor, expert: int, num_experts: int) -> Tensor:
        dtype = weight.dtype
        # In each projection's A those of `num_experts` experts lie behind one another.
        lora_A = self.compute_A(dtype).unflatten(0, (num_experts, -1))[expert]
        lora_B = self.compute_B(dtype).unflatten(0, (num_experts, -1))[expert]
        merged = (lora_B.mT @ lora_A).add_(weight)
        row_scale = self.row_scale()
        if row_scale is None:
            return merged
        of_expert = row_scale.to(dtype).unflatten(0, (num_experts, -1))[expert]
        return merged.mul_(of_expert.view(*merged.shape[:-1], 1))


class OwnModule(Weights):
    """What an adapter has in place of a module of the base model, at a path in it."""

    def __init__(self, path: str, *, is_linear: bool):
        super().__init__()
        self.path = path
        self.is_linear = is_linear

    def compute_form(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """Bring the weights into the form in which `outputs` takes them: a head's, the base's."""
        weights = dict(self.named_parameters())
        if not self.is_linear:
            return weights
        return {name: weight.to(dtype) for name, weight in weights.items()}

    @abstractmethod
    def outputs(self, module: Any, weights: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """Compute what the adapter's rows, the inputs, get in place of the module's own forward."""

    @abstractmethod
    def stored(self, name: str, weight: Tensor) -> Tensor:
        """Give a parameter, here the base's, with which the module itself computes the same."""
