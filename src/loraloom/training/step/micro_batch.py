"""A job's share of a fused step: the rows that it puts in, and what comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from loraloom.adapters.adapter import Adapter
from loraloom.data.examples import Example
from loraloom.routing.collapse import Choices
from loraloom.routing.record import RouterName
from loraloom.training.step.objectives import Objective, Reference
from loraloom.training.step.window import Window


@dataclass(frozen=True)
class MicroBatch:
    """What a job puts into the next forward.

    Args:
        adapter: Whose rows these are.
        examples: The samples; the chosen and the rejected answer of a pair in turn.
        sample_keys: Each sample's key for dropout and jitter.
        window: The step that they belong to.
        objective: What is minimised.
        reference: What the objective compares with, if it does.
        max_row_length: Most tokens of a row that samples share; None: each has a row.
        counts: Whether anything comes of it; False for a rank that no example is left for.
        loss_scale: Factor of the loss in the backward pass alone.
        is_last: Whether the step's gradient is complete with it.
    """

    adapter: Adapter
    examples: Sequence[Example]
    sample_keys: Sequence[int]
    window: Window
    objective: Objective
    reference: Reference | None = None
    max_row_length: int | None = None
    counts: bool = True
    loss_scale: float = 1.0
    is_last: bool = False

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(len(example.input_ids) for example in self.examples)

    def halves(self) -> list[MicroBatch]:
        """Cut it in two of about the same size, pairs of answers whole; nothing if it has one.

        The step's gradient is complete with neither of them alone.
        Examples come the longest first: where they are packed, every other one makes halves alike.
        """
        starts = self._starts
        if len(starts) < 2:
            return []
        middle = (len(starts) + 1) // 2
        cut = (starts[:middle], starts[middle:])
        if self.max_row_length is not None:
            cut = (starts[::2], starts[1::2])
        return [replace(self._subset(half), is_last=False) for half in cut]

    def share(self, rank: int, num_ranks: int) -> MicroBatch:
        """Return what one of several ranks computes: every so-many-th example.

        A rank that none is left for gets the shortest one, which doesn't count: all ranks make the
        same forwards then.
        """
        if num_ranks == 1:
            return self
        own = self._starts[rank::num_ranks]
        return self._subset(own) if own else replace(self._subset(self._starts[-1:]), counts=False)

    @property
    def _starts(self) -> range:
        """Where each example's rows begin."""
        return range(0, len(self.examples), len(self.window.examples[0].rows))

    def _subset(self, starts: Sequence[int]) -> MicroBatch:
        """Return some examples, with all their rows."""
        places = [start + row for start in starts for row in range(self._starts.step)]
        examples = [self.examples[place] for place in places]
        return replace(
            self, examples=examples, sample_keys=[self.sample_keys[place] for place in places]
        )


@dataclass(frozen=True)
class MicroBatchLoss:
    """A micro-batch's share of its step: shares add up to the step's figures.

    Args:
        loss: Its part of the objective.
        aux_loss: Router losses, with coefficients, by its share of the step's real tokens.
        router_entropy: Of the routers, by the same share; None without a router.
        router_load_cv: Likewise.
        metrics: Of the objective, by their names in metrics.jsonl.
        computed_tokens: Tokens of its rows, padding included.
        tokens_per_expert: How often each router chose each expert; empty without a router.
    """

    loss: float
    aux_loss: float = 0.0
    router_entropy: float | None = None
    router_load_cv: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    computed_tokens: int = 0
    tokens_per_expert: dict[RouterName, list[int]] = field(default_factory=dict)

    def __add__(self, other: MicroBatchLoss) -> MicroBatchLoss:
        return MicroBatchLoss(
            self.loss + other.loss,
            self.aux_loss + other.aux_loss,
            _add(self.router_entropy, other.router_entropy),
            _add(self.router_load_cv, other.router_load_cv),
            {name: self.metrics.get(name, 0.0) + value for name, value in other.metrics.items()},
            self.computed_tokens + other.computed_tokens,
            add_counts(self.tokens_per_expert, other.tokens_per_expert),
        )


def add_counts(first: Choices, second: Choices) -> dict[RouterName, list[int]]:
    """Add how often each router chose each expert; none at all counts as zeros."""
    if not first or not second:
        return {router: list(counts) for router, counts in (first or second).items()}
    return {
        router: [a + b for a, b in zip(counts, second[router], strict=True)]
        for router, counts in first.items()
    }


def _add(left: float | None, right: float | None) -> float | None:
    return right if left is None else left if right is None else left + right


@dataclass(frozen=True)
class StepReport:
    """What a step of a job did.

    `warnings` are new with it. A job without a `loss_scale` skips no steps; `grad_norm` is not
    finite where it did.
    """

    step: int
    epoch: float
    loss: MicroBatchLoss
    learning_rate: float
    grad_norm: float
    tokens: int
    computed_tokens: int
    warnings: tuple[str, ...] = ()
    loss_scale: float | None = None
    skipped_steps: int = 0


def padding_share(tokens: int, computed_tokens: int) -> float:
    """Return the share of computed tokens that are no real ones; 0 before the first."""
    return 1 - tokens / computed_tokens if computed_tokens else 0.0
