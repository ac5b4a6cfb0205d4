"""Adapters against each other on the same questions, and several seeds as one.

Adapters named `NAME@SEED` are seeds of NAME: `mixlora@0`, `mixlora@1`. Together they count as one
contestant NAME, whose answer to a question is the share of them that are right.

Answers are those of an evaluation that has just run, or of files that `--per-question` wrote:

    >>> (task,) = read_answers("a.jsonl", "b.jsonl")
    >>> compare(task, "mix", "plain").p_value
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from loraloom.data.sources import Row, read_rows
from loraloom.errors import AdapterError, ConfigError, DataError
from loraloom.eval.statistics import PairedComparison, compare_paired, holm

BASE = "base"
"""What results call the base model."""

_NO_FILTER = "none"
"""What lm-eval calls the filter that leaves answers as they are."""

_Answers = dict[int, tuple[str, bool]]
"""By a question's place: its hash, and whether it was answered right."""

MAX_FOR_ALL_PAIRS = 4
"""Contestants, besides the base model, of whom all pairs are compared without being asked for."""

Pair = tuple[str, str]

Metric = Literal["accuracy", "loss"]
"""What is compared: of accuracies more is better, of losses (in nats a token) less."""


@dataclass(frozen=True)
class TaskAnswers:
    """Whether each question of a task was answered right.

    Args:
        task: Name of the task.
        questions: Their places in the split.
        right: By adapter, in the order of the questions; `base` is the base model.
    """

    task: str
    questions: tuple[int, ...]
    right: Mapping[str, tuple[bool, ...]]


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


def shares_right(answers: TaskAnswers, name: str) -> list[float]:
    """Score each question: 1.0 if right, 0.0 if not; for a group, the share of its seeds."""
    try:
        members = members_of(name, list(answers.right))
    except ConfigError as error:
        raise ConfigError(f"{answers.task} must have answers of {name!r}, {error}") from None
    return [fmean(seeds) for seeds in zip(*(answers.right[one] for one in members), strict=True)]


def adjusted(found: Sequence[tuple[str, str, str, PairedComparison, Metric]]) -> list[Comparison]:
    """Adjust p-values for the number of comparisons: task, first, second, result and metric."""
    p_values = holm([result.p_value for _, _, _, result, _ in found])
    return [
        Comparison(task, first, second, result, p_value, metric)
        for (task, first, second, result, metric), p_value in zip(found, p_values, strict=True)
    ]


def summarise_seeds(tasks: Sequence[TaskAnswers]) -> dict[str, dict[str, Any]]:
    """Give mean and sample standard deviation by group and task, as they stand under `seeds`."""
    return seed_means({task.task: {n: fmean(r) for n, r in task.right.items()} for task in tasks})


def seed_means(figures: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """The same of figures by task and adapter."""
    summary: dict[str, dict[str, Any]] = {}
    for task, by_adapter in figures.items():
        for stem, members in seed_groups(list(by_adapter)).items():
            values = [by_adapter[name] for name in members]
            group = summary.setdefault(stem, {"adapters": members, "tasks": {}})
            spread = {"mean": fmean(values), "sd": stdev(values), "num_seeds": len(values)}
            group["tasks"][task] = spread
    return summary


def read_answers(*paths: str | Path) -> list[TaskAnswers]:
    """The answers in files of `loraloom eval --per-question`, `--harness` or not, joined by task.

    Args:
        paths: At least one. Several may hold different adapters, or different tasks.

    Raises:
        DataError: If a file is missing or damaged, or its task has no right answers, if adapters of
            one task were asked different questions, or if two files have other answers of an
            adapter of the same name.
    """
    known_answers: dict[str, dict[str, _Answers]] = {}
    for path in paths:
        for task, adapter, answers in _read_file(Path(path)):
            known = known_answers.setdefault(task, {}).setdefault(adapter, answers)
            if known != answers:
                raise DataError(
                    f"{path}: {adapter!r} must have the answers to {task} that it has in the files "
                    "before, got others; give each adapter a name of its own"
                )
    return [_join(task, by_adapter) for task, by_adapter in known_answers.items()]


def _read_file(path: Path) -> Iterator[tuple[str, str, _Answers]]:
    answers: dict[tuple[str, str], _Answers] = {}
    for row in read_rows(path):
        key = (_task_of(row), row.text("adapter"))
        index, correct = row.integer("index"), row.get("correct")
        if not isinstance(correct, bool):
            row.reject(f"field 'correct' must be true or false, got {correct!r}")
        if index in answers.setdefault(key, {}):
            row.reject(f"{key[1]!r} must answer question {index} of {key[0]} once, got it again")
        answers[key][index] = (row.text("question"), correct)
    for (task, adapter), by_index in answers.items():
        yield task, adapter, by_index


def _task_of(row: Row) -> str:
    """A task's name; answers that lm-eval filtered in several ways count as several tasks."""
    chosen_filter = row.get("filter", _NO_FILTER)
    return row.text("task") + ("" if chosen_filter == _NO_FILTER else f",{chosen_filter}")


def _join(task: str, by_adapter: Mapping[str, _Answers]) -> TaskAnswers:
    first, asked = next(iter(by_adapter.items()))
    questions = sorted(asked)
    for adapter, answers in by_adapter.items():
        others = [index for index in asked.keys() & answers if asked[index][0] != answers[index][0]]
        if others:
            raise DataError(
                f"{task}: adapters must have been asked the same questions, got another question "
                f"{min(others)} of {adapter!r} than of {first!r}; take files of the same split"
            )
        if sorted(answers) != questions:
            raise DataError(
                f"{task}: adapters must have been asked the same questions, got "
                f"{len(questions)} of {first!r} and {len(answers)} of {adapter!r}"
            )
    return TaskAnswers(
        task,
        tuple(questions),
        {
            adapter: tuple(answers[question][1] for question in questions)
            for adapter, answers in by_adapter.items()
        },
    )
