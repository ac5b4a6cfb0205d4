"""An evaluation by several processes, each with a part of the questions."""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from torch import Tensor, distributed


class SharedByProcesses(TemplateLM):
    """A model of which every process of torch.distributed has a copy.

    lm-eval gives each process its part of the questions, and the first one the results. Where no
    process group is there, as in most evaluations, one process does everything.
    """

    @property
    def rank(self) -> int:
        """Which of the processes this is."""
        return distributed.get_rank() if _is_distributed() else 0

    @property
    def world_size(self) -> int:
        """How many processes there are."""
        return distributed.get_world_size() if _is_distributed() else 1

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Collect a tensor of every process, one after another."""
        if not _is_distributed():
            return tensor
        row = tensor.reshape(-1)
        rows = [torch.empty_like(row) for _ in range(self.world_size)]
        distributed.all_gather(rows, row)
        return torch.cat(rows)

    def gather_object(self, obj: Any, dst: int = 0) -> Any:
        """Collect an object of every process in one of them; the others get None."""
        if not _is_distributed():
            return [obj]
        objects = [None] * self.world_size if self.rank == dst else None
        distributed.gather_object(obj, objects, dst)
        return objects

    def barrier(self) -> None:
        """Wait for the other processes."""
        if _is_distributed():
            distributed.barrier()


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()
