"""A job's share of a fused step: the rows that it puts in, and what comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraloom.adapters.adapter import Adapter
from loraloom.data.examples import Example
from loraloom.train.window import Window


@dataclass(frozen=True)
class MicroBatch:
    """What a job puts into the next forward.

    Args:
        adapter: Whose rows these are.
        examples: One a row.
        sample_keys: Each row's key for dropout and jitter.
        window: The step that they belong to.
    """

    adapter: Adapter
    examples: Sequence[Example]
    sample_keys: Sequence[int]
    window: Window

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(len(example.input_ids) for example in self.examples)


@dataclass(frozen=True)
class MicroBatchLoss:
    """A micro-batch's share of its step: shares add up to the step's figures.

    Args:
        loss: Sum of its token losses over the labels of the whole step.
        aux_loss: Router losses, with coefficients, by its share of the step's real tokens.
        router_entropy: Of the routers, by the same share; None without a router.
        router_load_cv: Likewise.
    """

    loss: float
    aux_loss: float = 0.0
    router_entropy: float | None = None
    router_load_cv: float | None = None

    def __add__(self, other: MicroBatchLoss) -> MicroBatchLoss:
        return MicroBatchLoss(
            self.loss + other.loss,
            self.aux_loss + other.aux_loss,
            _add(self.router_entropy, other.router_entropy),
            _add(self.router_load_cv, other.router_load_cv),
        )


def _add(left: float | None, right: float | None) -> float | None:
    return right if left is None else left if right is None else left + right


@dataclass(frozen=True)
class StepReport:
    """What a step of a job did."""

    step: int
    epoch: float
    loss: MicroBatchLoss
    learning_rate: float
    grad_norm: float
    tokens: int
