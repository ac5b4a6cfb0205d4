"""What training and evaluation are made of: examples and choice questions."""

from __future__ import annotations

from dataclasses import dataclass

NO_LOSS = -100
"""The label of a token that is read but not learnt."""


@dataclass(frozen=True)
class Example:
    """One tokenised training example.

    `labels[i]` is the token at i, or NO_LOSS; the shift by one is the trainer's. `sample_id` is the
    same in every epoch, whatever the order. `expert_group` is that of its source.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    sample_id: int
    expert_group: int = 0

    @property
    def rows(self) -> tuple[Example, ...]:
        """The rows that it puts into a forward: itself."""
        return (self,)


def count_labels(example: Example) -> int:
    """Count the tokens that are predicted: the first one has nothing before it."""
    return sum(label != NO_LOSS for label in example.labels[1:])


@dataclass(frozen=True)
class PreferencePair:
    """Two tokenised answers to one prompt, each a row and a sample of its own.

    Args:
        chosen: The prompt with the better answer, which has the labels.
        rejected: With the worse one.
    """

    chosen: Example
    rejected: Example

    @property
    def rows(self) -> tuple[Example, ...]:
        """The rows that it puts into a forward: the chosen, then the rejected."""
        return (self.chosen, self.rejected)


TrainingExample = Example | PreferencePair
"""What a batch is counted in."""


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question whose answer is the choice with the highest log-likelihood over its normalizer.

    The three tuples `contexts`, `continuations` and `normalizers` have one entry for each choice. A
    continuation includes its leading delimiter; a normalizer divides the summed log-likelihood of
    that continuation (1 compares sums, the number of characters compares averages).
    """

    task: str
    index: int
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    labels: tuple[str, ...]
    gold: int
    normalizers: tuple[float, ...]
    group: str | None = None
