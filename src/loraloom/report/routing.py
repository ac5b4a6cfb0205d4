"""Where a mixture's tokens went, as tables of shares."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from loraloom.eval.results import AdapterRouting, TaskRouting

LEVELS = (0.01, 0.33, 0.67, 1.5, 3.0)
"""Where a cell's color changes: the load as a multiple of an even share."""

_CLASSES: Mapping[Literal["topics", "token_classes"], str] = {
    "topics": "topic",
    "token_classes": "kind of token",
}


@dataclass(frozen=True)
class Row:
    """A row of a heatmap, shares of the load, and what stands behind it."""

    label: str
    load: Sequence[float]
    figures: Sequence[float]


@dataclass(frozen=True)
class Told:
    """What an expert tells of a token's class, by layer, in bits.

    Args:
        what: The classes in a word: topic, or kind of token.
        classes: Their names.
        rows: A layer, the mutual information, and how far each class's load is from that of all.
    """

    what: str
    classes: Sequence[str]
    rows: Sequence[tuple[str, float, Sequence[float]]]

    @property
    def mean(self) -> float:
        """Mean distance of a class in a layer, at least a millibit, to compare others with."""
        return max(0.001, fmean(value for *_, values in self.rows for value in values))


@dataclass(frozen=True)
class Mixture:
    """A mixture's routing, laid out.

    Args:
        name: Of the adapter.
        routing: As the file has it.
        coverage: A sentence on what is covered.
        layers: A row for each layer, over all tasks: load; effective experts, entropy of the mean
            probabilities, mean entropy of tokens, in bits.
        told: What experts tell of topics, if there are several, and of kinds of tokens.
        similarity: A row for each task: its likeness to every one; None on the diagonal.
        examples: A text of each task, with the experts of its tokens.
    """

    name: str
    routing: AdapterRouting
    coverage: str
    layers: Sequence[Row]
    told: Sequence[Told]
    similarity: Mapping[str, Sequence[float | None]]
    examples: Mapping[str, Mapping[str, Any]]

    @property
    def uniform_bits(self) -> float:
        """The highest entropy."""
        return math.log2(self.routing.num_experts)


def lay_out(name: str, routing: AdapterRouting) -> Mixture:
    """Lay a mixture's routing out for the page."""
    covered = {task: one for task, one in routing.tasks.items() if one.load}
    return Mixture(
        name=name,
        routing=routing,
        coverage=_coverage(routing.tasks),
        layers=_layer_rows(routing, list(covered.values())),
        told=[
            _told(what, routing.specialisation[kind], routing.layers)
            for kind, what in _CLASSES.items()
            if kind in routing.specialisation
        ],
        similarity=_similarity(routing, list(covered)),
        examples={task: one.example for task, one in covered.items() if one.example is not None},
    )


def _told(
    what: str, found: Mapping[Literal["bits", "of"], Any], layers: Sequence[int | str]
) -> Told:
    by_layer = zip(*found["of"].values(), strict=True)
    rows = [
        (str(layer), bits, values)
        for layer, bits, values in zip(layers, found["bits"], by_layer, strict=True)
    ]
    return Told(what, list(found["of"]), rows)


def _coverage(tasks: Mapping[str, TaskRouting]) -> str:
    covered = sum(task.num_questions_covered for task in tasks.values())
    asked = sum(task.num_questions for task in tasks.values())
    tokens = sum(task.num_tokens for task in tasks.values())
    text = f"{covered:,} of {asked:,} questions, {tokens:,} tokens."
    if covered < asked:
        text += (
            " The scores of the others were kept from before; evaluate with --no-cache to cover "
            "them."
        )
    return text


def _layer_rows(routing: AdapterRouting, tasks: Sequence[TaskRouting]) -> list[Row]:
    """Rows over all tasks, none without a task; each weighs by its tokens."""
    if not tasks:
        return []
    weights = [task.num_tokens for task in tasks]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(map(operator.mul, weights, values)) / sum(weights)

    def means(rows: Iterable[Sequence[float]]) -> list[float]:
        return [mean(values) for values in zip(*rows, strict=True)]

    def entropy(place: int) -> float:
        if not all(task.mean_probabilities for task in tasks):  # in files of earlier versions
            return mean([task.mean_entropy_bits[place] for task in tasks])
        together = means(task.mean_probabilities[place] for task in tasks)
        return math.log2(effective_number(together))

    sizes = routing.experts_by_layer or [routing.num_experts] * len(routing.layers)
    return [
        _row(
            str(layer),
            means(task.load[place] for task in tasks)[:size],
            entropy(place),
            mean([task.token_entropy_bits[place] for task in tasks]),
        )
        for place, (layer, size) in enumerate(zip(routing.layers, sizes, strict=True))
    ]


def _row(label: str, load: Sequence[float], *figures: float) -> Row:
    return Row(label, load, [effective_number(load), *figures])


def level(multiple: int | float) -> int:
    """The level of a load, as a multiple of an even share: 0 is unused, 3 about even, 5 most."""
    return sum(multiple >= bound for bound in LEVELS)


def effective_number(load: Sequence[float]) -> float:
    """Compute exp of the load's entropy, as `loraloom.routing.tally` does on tensors."""
    return math.exp(-math.fsum(share * math.log(share) for share in load if share > 0))


def _similarity(routing: AdapterRouting, tasks: Sequence[str]) -> dict[str, list[float | None]]:
    known = {frozenset((one["first"], one["second"])): one["mean"] for one in routing.similarity}
    if not known:
        return {}
    return {row: [known.get(frozenset((row, column))) for column in tasks] for row in tasks}
