"""Which experts of a base model its routers choose for some texts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loraloom.base.structure import expert_modules
from loraloom.errors import ModelError
from loraloom.host.host import Host


def count_choices(
    host: Host, rows: Iterable[Sequence[int]], advance: Callable[[Sequence[int]], object]
) -> dict[int, Tensor]:
    """Count by layer how many tokens of the rows each expert computes, [E].

    Args:
        host: The base model.
        rows: Token ids.
        advance: Called with the index of a row that has been counted.

    Raises:
        ModelError: If the base model has no experts.
    """
    counts = dict[int, Tensor]()
    with ExitStack() as hooks:
        for layer, block, module in expert_modules(host.model, host.base):
            num_experts = next(iter(block.shapes.values()))[0]
            counts[layer] = torch.zeros(num_experts, dtype=torch.long, device=host.device)
            handle = module.register_forward_pre_hook(partial(_count, counts[layer]))
            hooks.callback(handle.remove)
        if not counts:
            raise ModelError(
                f"{host.base.name_or_path} must be a mixture of experts to choose among them"
            )
        for number, row in enumerate(rows):
            with torch.inference_mode():
                host(torch.tensor([row], device=host.device))
            advance([number])
    return {layer: count.cpu() for layer, count in counts.items()}


def _count(counts: Tensor, module: Any, args: Sequence[Tensor]) -> None:
    _, index, _ = args
    counts += torch.bincount(index.flatten(), minlength=len(counts))


def busiest_experts(counts: Mapping[int, Tensor], share: float) -> dict[int, list[int]]:
    """Choose by layer the fewest experts that compute a share of the tokens' choices, in order."""
    chosen = {}
    for layer, count in counts.items():
        numbers = count.argsort(descending=True, stable=True)
        covered = count[numbers].cumsum(0) / count.sum()
        num_chosen = 1 + int((covered < share).sum())
        chosen[layer] = sorted(numbers[:num_chosen].tolist())
    return chosen
