"""The processes that share a run's rows, and what they tell each other.

Every rank holds all adapters whole and does the same rounds. Of each micro-batch it computes its
own rows; gradients, losses and counts are added up over all ranks. So all of them go on with the
same numbers, bit by bit, and whatever is decided by these is decided alike everywhere.
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

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Item = TypeVar("Item")
Result = TypeVar("Result")

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others, while one writes a snapshot for example."""


class RankLost(BaseException):
    """The other ranks can't be reached any more.

    It is no `Exception`, as those end the job that is at fault, and here none is.
    """


def whole(tensor: Tensor) -> Tensor:
    """Put a tensor together of which each rank has a part; all of them call this."""
    return tensor.full_tensor() if _is_distributed(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Return what this rank has of a tensor."""
    return tensor.to_local() if _is_distributed(tensor) else tensor


def _is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether ranks hold parts of a tensor. One process is spared a second for the import."""
    if not dist.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


class Ranks(ABC):
    """What a rank knows of the others.

    Attributes:
        rank: Its number, from 0.
        size: How many there are.
        local_size: How many of them are on this machine.
        in_lockstep: A forward takes all ranks, as each holds a part of the base model.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    in_lockstep: bool = False

    def __init__(self) -> None:
        self._is_apart = False

    @abstractmethod
    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Begin to add a tensor up in place, and return what waits until it is done.

        All ranks begin their sums in the same order.
        """

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Tell all ranks a value of tensors, texts and numbers, and return what each one told."""

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all ranks, to bit-equal sums on all of them."""
        self.start_sum(tensor)()
        return tensor

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes files and speaks to the user."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self.sum(torch.tensor(float(flag))) > 0)

    def first(self, flag: bool) -> bool:
        """Whether it is so on the first rank."""
        return self.any(flag and self.is_first)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Let what fails on one rank fail on all, so that all go on in the same way."""
        try:
            yield
        except Exception as error:
            self._agree(error)
            raise
        self._agree(None)

    def spread(
        self,
        items: Sequence[Item],
        compute: Callable[[Item], Result],
        *,
        makes_forwards: bool = True,
    ) -> Iterator[Result]:
        """Compute items, each on one rank, and give all results in the order of the items.

        Within `compute` a rank is alone.
        """
        if self.size == 1 or self._is_apart:
            yield from map(compute, items)
            return
        in_lockstep = self.in_lockstep and makes_forwards
        own = items if in_lockstep else items[self.rank :: self.size]
        with self.together(), self._apart():
            results = [compute(item) for item in own]
        parts = [iter(part) for part in self.gather(results)]
        for place in range(len(items)):
            yield next(parts[0 if in_lockstep else place % self.size])

    def keep_at_first(self, parameters: Iterable[Parameter]) -> None:
        """Drop gradients that all ranks have, except on the first: they count once."""
        if not self.is_first:
            for parameter in parameters:
                parameter.grad = None

    def check_alike(self, facts: dict[str, str]) -> list[str]:
        """Name the facts that are not the same on all ranks."""
        told = self.gather(facts)
        names = dict.fromkeys(name for own in told for name in own)
        return [name for name in names if len({own.get(name) for own in told}) > 1]

    def _agree(self, error: Exception | None) -> None:
        """Raise on all ranks what some have run into; a rank's own error is left to the caller."""
        if not self.any(error is not None):
            return
        is_general = error is not None and not isinstance(error, torch.OutOfMemoryError)
        text = f"{type(error).__name__}: {error}" if is_general else ""
        faults = [(rank, told) for rank, told in enumerate(self.gather(text)) if told]
        if faults and not is_general:
            rank, told = faults[0]
            raise RuntimeError(f"on rank {rank}: {told}")
        if error is None:
            raise torch.OutOfMemoryError("memory ran out on another rank")

    @contextmanager
    def _apart(self) -> Iterator[None]:
        self._is_apart = True
        try:
            yield
        finally:
            self._is_apart = False


@final
class Alone(Ranks):
    """A single process."""

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """Leave the tensor as it is."""
        return lambda: None

    def gather(self, value: Any) -> list[Any]:
        """Return the value."""
        return [value]


@final
class ProcessRanks(Ranks):
    """The processes of torch.distributed's default group."""

    def __init__(self, backend: str, local_size: int, *, in_lockstep: bool = False):
        super().__init__()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.local_size = local_size
        self.in_lockstep = in_lockstep
        self._group = dist.new_group(backend=backend, timeout=TIMEOUT)

    def start_sum(self, tensor: Tensor) -> Callable[[], None]:
        """See Ranks."""
        with self._reaching_others():
            work: Any = dist.all_reduce(tensor, group=self._group, async_op=True)

        def wait() -> None:
            with self._reaching_others():
                work.wait()

        return wait

    def gather(self, value: Any) -> list[Any]:
        """See Ranks."""
        file = io.BytesIO()
        torch.save(value, file)
        own = torch.frombuffer(bytearray(file.getbuffer()), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        with self._reaching_others():
            dist.all_gather(lengths, torch.tensor([len(own)]), group=self._group)
            longest = int(max(lengths))
            padded = torch.cat([own, own.new_zeros(longest - len(own))])
            parts = [torch.empty_like(padded) for _ in range(self.size)]
            dist.all_gather(parts, padded, group=self._group)
        return [
            torch.load(io.BytesIO(part[: int(length)].numpy().tobytes()), weights_only=True)
            for part, length in zip(parts, lengths, strict=True)
        ]

    @contextmanager
    def _reaching_others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise RankLost(
                f"rank {self.rank} of {self.size} can't reach the others any more, one has died or "
                f"doesn't answer ({reason}); --resume goes on from the last checkpoint, on any "
                "number of ranks"
            ) from error
