"""The linear gate that methods with experts share.

Axes: E experts, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from loraloom.adapters.adapter import Weights
from loraloom.adapters.low_rank import generator_for, kaiming_uniform


class Router(Weights):
    """A gate's weight, [E, I]."""

    def __init__(
        self,
        key: str,
        shape: tuple[int, int],
        seed: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        std: float | None = None,
        has_bias: bool = False,
    ):
        super().__init__()
        self.key = key
        if std is None:
            initial = kaiming_uniform(shape, seed, key)
        else:
            initial = torch.empty(shape).normal_(std=std, generator=generator_for(seed, key))
        self.weight = nn.Parameter(initial.to(dtype=dtype, device=device))
        self.bias = None
        if has_bias:
            self.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype, device=device))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the weight under its name, and the bias."""
        yield self.key, self.weight.detach()
        if self.bias is not None:
            yield f"{self.key}_bias", self.bias.detach()
