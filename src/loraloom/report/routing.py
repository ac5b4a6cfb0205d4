"""Where a mixture's tokens went, as tables of shares."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loraloom.report.files import AdapterRouting, Example, LayerWords, TaskRouting

LEVELS = (0.01, 0.33, 0.67, 1.5, 3.0)
"""Where a cell's color changes: the load as a multiple of an even share."""

NUM_EXPERT_COLORS = 8

Load = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Cell:
    """A share of the load in percent, and the level of its color."""

    percent: float
    level: int


@dataclass(frozen=True)
class Row:
    """A row of a heatmap and what stands behind it."""

    label: str
    cells: Sequence[Cell]
    figures: Sequence[float]


@dataclass(frozen=True)
class Token:
    """A token of an example, its expert, and whether the next one goes elsewhere."""

    text: str
    expert: int
    color: int
    ends_run: bool


@dataclass(frozen=True)
class ColoredText:
    """A task's example, its tokens by layer."""

    task: str
    layers: Mapping[int, Sequence[Token]]


@dataclass(frozen=True)
class Mixture:
    """A mixture's routing, laid out.

    Args:
        name: Of the adapter.
        num_experts: E.
        top_k: K.
        coverage: A sentence on what is covered.
        layers: A row for each layer, over all tasks: load; effective experts, entropy of the mean
            probabilities, mean entropy of tokens, in bits.
        tasks: A row for each task, over all layers: load; effective experts.
        similarity: A row for each task: its likeness to every one; None on the diagonal.
        words: Typical tokens.
        examples: Texts.
        warnings: What has collapsed.
    """

    name: str
    num_experts: int
    top_k: int
    coverage: str
    layers: Sequence[Row]
    tasks: Sequence[Row]
    similarity: Mapping[str, Sequence[float | None]]
    words: Sequence[LayerWords]
    examples: Sequence[ColoredText]
    warnings: Sequence[str]

    @property
    def uniform_bits(self) -> float:
        """The highest entropy."""
        return math.log2(self.num_experts)


def lay_out(name: str, routing: AdapterRouting) -> Mixture:
    """Lay a mixture's routing out for the page."""
    covered = {task: one for task, one in routing.tasks.items() if one.load}
    return Mixture(
        name=name,
        num_experts=routing.num_experts,
        top_k=routing.top_k,
        coverage=_coverage(routing.tasks),
        layers=_layer_rows(routing.layers, list(covered.values())),
        tasks=[_row(task, _mean(one.load)) for task, one in covered.items()],
        similarity=_similarity(routing, list(covered)),
        words=routing.words,
        examples=list(_examples(covered)),
        warnings=routing.warnings,
    )


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


def _layer_rows(layers: Sequence[int], tasks: Sequence[TaskRouting]) -> list[Row]:
    """Rows over all tasks; each weighs by its tokens."""
    rows = []
    for place, layer in enumerate(layers):
        weighted = [(task.num_tokens, task.load[place]) for task in tasks]
        entropies = [
            _weighted([(task.num_tokens, values[place]) for task, values in by_task])
            for by_task in (
                [(task, task.mean_entropy_bits) for task in tasks],
                [(task, task.token_entropy_bits) for task in tasks],
            )
        ]
        load = [
            _weighted([(weight, row[expert]) for weight, row in weighted])
            for expert in range(len(weighted[0][1]))
        ]
        rows.append(_row(str(layer), load, *entropies))
    return rows


def _row(label: str, load: Sequence[float], *figures: float) -> Row:
    cells = [Cell(100 * share, level(share * len(load))) for share in load]
    return Row(label, cells, [effective_number(load), *figures])


def level(multiple: int | float) -> int:
    """The level of a load, as a multiple of an even share: 0 is unused, 3 about even, 5 most."""
    return sum(multiple >= bound for bound in LEVELS)


def effective_number(load: Sequence[float]) -> float:
    """Compute exp of the load's entropy, as `loraloom.routing.totals` does on tensors."""
    return math.exp(-math.fsum(share * math.log(share) for share in load if share > 0))


def _mean(load: Load) -> list[float]:
    return [math.fsum(column) / len(load) for column in zip(*load, strict=True)]


def _weighted(pairs: Sequence[tuple[int, float]]) -> float:
    return math.fsum(w * value for w, value in pairs) / math.fsum(w for w, _ in pairs)


def _similarity(routing: AdapterRouting, tasks: Sequence[str]) -> dict[str, list[float | None]]:
    known = {frozenset((one.first, one.second)): one.mean for one in routing.similarity}
    if not known:
        return {}
    return {row: [known.get(frozenset((row, column))) for column in tasks] for row in tasks}


def _examples(tasks: Mapping[str, TaskRouting]) -> Iterator[ColoredText]:
    for name, task in tasks.items():
        if (example := task.example) is not None:
            by_layer = {layer: _color(example, layer) for layer in example.experts}
            yield ColoredText(name, by_layer)


def _color(example: Example, layer: int) -> list[Token]:
    experts = example.experts[layer]
    following = [*experts[1:], None]
    return [
        Token(text, expert, expert % NUM_EXPERT_COLORS, expert != after)
        for text, expert, after in zip(example.tokens, experts, following, strict=True)
    ]
