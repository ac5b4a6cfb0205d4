"""Adapters against each other on the same questions, and several seeds as one.

Adapters named `NAME@SEED` are seeds of NAME: `mixlora@0`, `mixlora@1`. Together they count as one
contestant NAME, whose answer to a question is the share of them that are right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from statistics import fmean, stdev
from typing import Any, Literal

from loraloom.errors import AdapterError, ConfigError
from loraloom.eval.answers import TaskAnswers
from loraloom.eval.results import BASE
from loraloom.eval.statistics import PairedComparison, compare_paired, holm

MAX_FOR_ALL_PAIRS = 4
"""Contestants, besides the base model, of whom all pairs are compared without being asked for."""

Pair = tuple[str, str]

Metric = Literal["accuracy", "loss"]
"""What is compared: of accuracies more is better, of losses (in nats a token) less."""


@dataclass(frozen=True)
class Comparison:
    """Two contestants on a task; `adjusted_p_value` is Holm's over all that were made together."""

    task: str
    first: str
    second: str
    result: PairedComparison
    adjusted_p_value: float
    metric: Metric = "accuracy"

    def to_json(self) -> dict[str, Any]:
        """The comparison as it stands in the JSON file under `comparisons`."""
        names = {
            "task": self.task,
            "metric": self.metric,
            "first": self.first,
            "second": self.second,
        }
        return {**names, **asdict(self.result), "adjusted_p_value": self.adjusted_p_value}


def seed_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Find adapters that are seeds of one thing; a single seed is no group."""
    groups = {stem: seeds for stem, seeds in _seeds_by_stem(names).items() if len(seeds) > 1}
    for stem in groups:
        if stem in names or stem == BASE:
            raise ConfigError(
                f"adapter names must be clear, got {stem!r} and its seeds "
                f"{', '.join(groups[stem])}; call one of them something else"
            )
    return groups


def _seeds_by_stem(names: Sequence[str]) -> dict[str, list[str]]:
    """Adapters NAME@SEED by NAME."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stem, at, _ = name.rpartition("@")
        if at:
            stems.setdefault(stem, []).append(name)
    return stems


def contestants(names: Sequence[str]) -> list[str]:
    """Names to compare: seeds as their group, the others as they are."""
    group_of = {member: stem for stem, members in seed_groups(names).items() for member in members}
    return list(dict.fromkeys(group_of.get(name, name) for name in names))


def members_of(name: str, names: Sequence[str]) -> list[str]:
    """The adapters that a contestant stands for: itself, or its seeds."""
    stems = _seeds_by_stem(names)
    members = [name] if name in names else stems.get(name)
    if members is None:
        raise ConfigError(f"got {', '.join(dict.fromkeys([*names, *stems]))}")
    return members


def choose_pairs(adapters: Sequence[str | None], wanted: Sequence[str] = ()) -> list[Pair]:
    """Decide whom to compare."""
    names = [name or BASE for name in adapters]
    seed_groups(names)  # are they clear?
    if wanted:
        pairs = [_parse_pair(text, names) for text in wanted]
        if len({frozenset(pair) for pair in pairs}) < len(pairs):
            raise ConfigError(f"--compare must name each pair once, got {', '.join(wanted)}")
        return pairs
    everybody = contestants(names)
    others = [name for name in everybody if name != BASE]
    pairs = [(name, BASE) for name in others] if BASE in everybody else []
    if len(others) <= MAX_FOR_ALL_PAIRS:
        pairs += combinations(others, 2)
    return pairs


def check_scored(adapters: Sequence[str | None], pairs: Sequence[Pair]) -> None:
    """Find what results could not tell, before anything is scored."""
    if not adapters:
        raise AdapterError("adapters must name at least one, or None for the base model, got none")
    if BASE in adapters:
        raise AdapterError(f"no adapter may be called {BASE}, which results call the base model")
    names = [name or BASE for name in adapters]
    seed_groups(names)  # are they clear?
    for name in (name for pair in pairs for name in pair):
        try:
            members_of(name, names)
        except ConfigError as error:
            raise ConfigError(f"pairs must be of what is scored, not {name!r}: {error}") from None


def _parse_pair(text: str, names: Sequence[str]) -> Pair:
    stems = _seeds_by_stem(names)
    known = list(dict.fromkeys([*names, *stems]))
    only = {stem: seeds[0] for stem, seeds in stems.items() if len(seeds) == 1}
    first, second = (
        name if name in names else only.get(name, name) for name in text.partition(":")[::2]
    )
    if first not in known or second not in known or first == second:
        raise ConfigError(
            f"--compare must be FIRST:SECOND, two of {', '.join(known)}, got {text!r}"
        )
    return first, second


def compare(answers: TaskAnswers, first: str, second: str, seed: int = 0) -> PairedComparison:
    """Compare two contestants on a task; see `compare_paired`.

    Args:
        answers: Of both.
        first: An adapter, a group of seeds, or `base`.
        second: Another.
        seed: Of the bootstrap.

    Raises:
        ConfigError: If the answers have no such name.
    """
    return compare_paired(shares_right(answers, first), shares_right(answers, second), seed)


def compare_all(tasks: Sequence[TaskAnswers], pairs: Sequence[Pair]) -> list[Comparison]:
    """Compare pairs on every task, and adjust the p-values for how many they are."""
    return adjusted([(task.task, *pair, compare(task, *pair)) for task in tasks for pair in pairs])


def adjusted(
    found: Sequence[tuple[str, str, str, PairedComparison]], metric: Metric = "accuracy"
) -> list[Comparison]:
    """Adjust p-values for the number of comparisons: task, first, second and result of each."""
    p_values = holm([result.p_value for *_, result in found])
    return [Comparison(*one, p_value, metric) for one, p_value in zip(found, p_values, strict=True)]


def shares_right(answers: TaskAnswers, name: str) -> list[float]:
    """Score each question: 1.0 if right, 0.0 if not; for a group, the share of its seeds."""
    try:
        members = members_of(name, list(answers.right))
    except ConfigError as error:
        raise ConfigError(f"{answers.task} must have answers of {name!r}, {error}") from None
    return [fmean(seeds) for seeds in zip(*(answers.right[one] for one in members), strict=True)]


def summarise_seeds(tasks: Sequence[TaskAnswers]) -> dict[str, dict[str, Any]]:
    """Give mean and sample standard deviation by group and task, as they stand under `seeds`."""
    summary: dict[str, dict[str, Any]] = {}
    for task in tasks:
        for stem, members in seed_groups(list(task.right)).items():
            accuracies = [fmean(task.right[name]) for name in members]
            group = summary.setdefault(stem, {"adapters": members, "tasks": {}})
            group["tasks"][task.task] = {
                "mean": fmean(accuracies),
                "sd": stdev(accuracies),
                "num_seeds": len(accuracies),
            }
    return summary
