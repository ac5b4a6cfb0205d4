"""The processes that share a run's rows, and what they send each other.

Every rank holds all adapters whole and computes its own rows of each micro-batch. Sums are over all
ranks, so that all go on with the same numbers, bit by bit, and decide alike.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import override

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Item = TypeVar("Item")
Result = TypeVar("Result")

# How long a rank waits for the others, while one writes a checkpoint for example.
TIMEOUT = timedelta(minutes=10)


class RankLost(BaseException):
    """The other ranks can't be reached any more, which is no fault of the job that ends here."""


def gather(tensor: Tensor) -> Tensor:
    """Put a tensor together of which each rank has a shard; all of them call this."""
    return tensor.full_tensor() if _is_distributed(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return tensor.to_local() if _is_distributed(tensor) else tensor


def copy_into(tensor: Tensor, values: Tensor) -> None:
    """Put values into a tensor of which each rank may have a shard; all of them call this."""
    if _is_distributed(tensor):
        from torch.distributed.tensor import distribute_tensor

        values = distribute_tensor(values, tensor.device_mesh, tensor.placements)
    tensor.copy_(values)


def _is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    if not dist.is_initialized():  # one process is spared a second for the import
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


class Ranks(ABC):
    """The ranks of a run; in lockstep each holds a part of the base model."""

    rank: int = 0
    size: int = 1
    in_lockstep: bool = False
    _is_apart: bool = False

    @abstractmethod
    def add_up(self, tensor: Tensor) -> None:
        """Add a tensor up in place, in the same order on all ranks."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Send all ranks a value of tensors, texts and numbers, and return what each one sent."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, to bit-equal sums on all of them."""
        total = tensor.detach().clone()
        self.add_up(total)
        return total

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let what fails on one rank fail on all, so that all go on in the same way."""
        try:
            yield
        except Exception as error:
            self._agree(error)
            raise
        self._agree(None)

    def _agree(self, error: Exception | None) -> None:
        """Raise on all ranks what some have run into; a rank's own error is left to the caller."""
        if not self.any(error is not None):
            return
        text = ""
        if error is not None and not isinstance(error, torch.OutOfMemoryError):
            text = f"{type(error).__name__}: {error}"
        faults = [f"on rank {n}: {sent}" for n, sent in enumerate(self.gather(text)) if sent]
        if text:
            return
        if faults:
            raise RuntimeError(faults[0])
        if error is None:
            raise torch.OutOfMemoryError("memory ran out on another rank")

    def spread(self, items: Sequence[Item], compute: Callable[[Item], Result]) -> Iterator[Result]:
        """Divide items among ranks, or compute all on each in lockstep; give results in order.

        What `compute` spreads itself is not divided again.
        """
        if self.size == 1 or self._is_apart:
            yield from map(compute, items)
            return
        share = items if self.in_lockstep else items[self.rank :: self.size]
        with self.together():
            self._is_apart = True
            try:
                results = [compute(item) for item in share]
            finally:
                self._is_apart = False
        by_rank = [iter(sent) for sent in self.gather(results)]
        for number in range(len(items)):
            rank = 0 if self.in_lockstep else number % self.size
            yield next(by_rank[rank])

    def keep_at_first(self, parameters: Iterable[Parameter]) -> None:
        """Drop gradients that all ranks have, except on the first: they count once."""
        for parameter in () if self.is_first else parameters:
            parameter.grad = None


@final
class Alone(Ranks):
    """A single process."""

    @override
    def add_up(self, tensor: Tensor) -> None:
        pass

    @override
    def gather(self, value: Any) -> list[Any]:
        return [value]


@final
class ProcessRanks(Ranks):
    """The processes of torch.distributed's default group."""

    def __init__(self, backend: str, *, in_lockstep: bool = False):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.in_lockstep = in_lockstep
        self._group = dist.new_group(backend=backend, timeout=TIMEOUT)

    @override
    def add_up(self, tensor: Tensor) -> None:
        with self._reaching_others():
            dist.all_reduce(tensor, group=self._group)

    @override
    def gather(self, value: Any) -> list[Any]:
        # torch's own gather of objects unpickles whatever comes
        file = io.BytesIO()
        torch.save(value, file)
        sent = torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with self._reaching_others():
            dist.all_gather(lengths, torch.tensor([len(sent)]), group=self._group)
            padded = torch.cat([sent, sent.new_zeros(int(max(lengths)) - len(sent))])
            received = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(received, padded, group=self._group)
        return [
            torch.load(io.BytesIO(data[: int(length)].numpy().tobytes()), weights_only=True)
            for data, length in zip(received, lengths, strict=True)
        ]

    @contextmanager
    def _reaching_others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.rank} of {self.size} lost contact with the other ranks "
                f"({str(error).strip().splitlines()[0]}); pass --resume to continue from the last "
                "checkpoint, on any number of ranks"
            ) from error
