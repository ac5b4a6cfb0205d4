"""How sure an accuracy is, and whether two adapters differ on the same questions.

Questions are the sample: intervals and p-values say how results would move with other questions.
How they move with another training seed is another doubt. Adapters named `NAME@NUMBER` are seeds
of NAME: together they count as one contestant, whose answer to a question is the share of them that
are right. Answers are those of an evaluation, or of files that `--per-question` wrote:

    >>> (task,) = read_answers("a.jsonl", "b.jsonl")
    >>> compare(task, "mix", "plain").p_value
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any

import numpy as np

from loraloom.adapters.weighted_sum import is_sum
from loraloom.config.text import local_path
from loraloom.data.sources import Row, read_rows
from loraloom.errors import AdapterError, ConfigError, DataError, shown
from loraloom.eval.results import BASE, Fields, PairedComparison

CONFIDENCE = 0.95
NUM_RESAMPLES = 10_000
# Of a resample, as right and wrong answers have: their counts are drawn, not the items.
_FEW_VALUES = 32

# Contestants, besides the base model, of whom all pairs are compared without being asked for.
MAX_FOR_ALL_PAIRS = 4

Pair = tuple[str, str]
# NAME@NUMBER, or an expert of it.
_SEED = re.compile(r"(.*)@\d+(|/[^@]*)")
# Of an answer in a file: `mark` is whether it is right, or a judge's score.
_COLUMNS = ["task", "adapter", "index", "question", "kind", "mark"]
# Of each question or row.
Values = Sequence[int | float] | np.ndarray


@dataclass(frozen=True)
class TaskAnswers:
    """Whether each question (its place in the split) was answered right, by adapter or `base`."""

    task: str
    questions: tuple[int, ...]
    right: Mapping[str, tuple[int | float, ...]]  # or what a judge scored


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """Compute Wilson's score interval of a share (Wilson 1927); it stays in [0, 1]."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    scale = 1 + z**2 / count
    centre = (share + z**2 / (2 * count)) / scale
    variance = share * (1 - share) / count
    shift = z / (2 * count)
    half = z / scale * math.sqrt(variance + shift**2)
    return max(centre - half, 0.0), min(centre + half, 1.0)


def share_fields(correct: Sequence[bool]) -> Fields:
    """Compute the accuracy, with its sample's standard error and Wilson's interval."""
    count = len(correct)
    share = fmean(correct)
    stderr = None
    if count > 1:
        stderr = math.sqrt(share * (1 - share) / (count - 1))
    return {
        "accuracy": share,
        "stderr": stderr,
        "num_examples": count,
        "interval": list(wilson_interval(share, count)),
    }


def mcnemar_p_value(num_first: int, num_second: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test (1947), min(1, 2 P[X ≤ min(b, c)])."""
    # X is binomial with b + c trials of 1/2; integers keep it exact for any number of questions
    trials = num_first + num_second
    term = total = 1
    for x in range(min(num_first, num_second)):
        term = term * (trials - x) // (x + 1)
        total += term
    return min(1.0, 2 * total / 2**trials)


def sign_flip_p_value(differences: np.ndarray, seed: int = 0) -> float:
    """Compute the two-sided p-value of Fisher's randomization test (1935) of the sum Σ d_i."""
    # Where neither side is better on the whole, each sign may as well be the other one. Who wins
    # more items says less: a group of seeds is nearly always a little right.
    nonzero = differences[differences != 0]
    if len(np.unique(np.abs(nonzero).round(12))) <= 1:
        num_positive = int((nonzero > 0).sum())
        return mcnemar_p_value(num_positive, len(nonzero) - num_positive)
    # a tie of thirds adds up to 1e-17
    total = nonzero.sum()
    observed = abs(total) - 1e-9 * np.abs(nonzero).sum()
    generator = np.random.default_rng(seed)
    num_extreme = 0
    for _ in range(NUM_RESAMPLES // 100):
        is_kept = generator.integers(2, size=(100, len(nonzero)), dtype=bool)
        sums = 2 * (is_kept @ nonzero) - total
        num_extreme += int((np.abs(sums) >= observed).sum())
    return (1 + num_extreme) / (1 + NUM_RESAMPLES)


def compare_paired(first: Values, second: Values, seed: int = 0) -> PairedComparison:
    """Compare two adapters, or two groups of seeds, on the same questions.

    Args:
        first: 1 for each question answered correctly, 0 for the others, or the share of seeds.
        second: The same for the other adapter, in the same order.
        seed: Random seed for the bootstrap.

    Raises:
        DataError: If there are no questions, or different numbers of them.
    """
    if not len(first) == len(second) > 0:
        raise DataError(
            "a paired comparison requires the same questions for both, at least one, got "
            f"{len(first)} and {len(second)}"
        )
    return compare_ratios(first, second, np.ones(len(first)), 1, seed)


def compare_ratios(
    first: Values, second: Values, lengths: Values, better: int, seed: int = 0
) -> PairedComparison:
    """Compare ratios of sums; the sign `better` says which differences speak for the first."""
    lengths = np.asarray(lengths, dtype=np.float64)
    both = np.asarray([first, second], dtype=np.float64)
    differences = both[0] - both[1]
    # a mean of seeds is rounded, which is no win
    is_noise = np.abs(differences) <= 1e-12 * np.abs(both).max()
    differences[is_noise] = 0
    leads = better * differences
    return PairedComparison(
        difference=round(float(differences.sum() / lengths.sum()), 12),
        stderr=ratio_stderr(differences, lengths),
        interval=ratio_intervals(differences[:, None], lengths, seed)[0],
        p_value=sign_flip_p_value(differences, seed),
        num_first_better=int((leads > 0).sum()),
        num_second_better=int((leads < 0).sum()),
        num_examples=len(differences),
    )


def ratio_stderr(sums: np.ndarray, lengths: np.ndarray) -> float | None:
    """Compute the standard error of R = Σ sums / Σ lengths over rows; None for a single row."""
    count = len(sums)
    if count == 1:
        return None
    total = lengths.sum()
    ratio = sums.sum() / total
    # of the ratio's linear part: sqrt(n / (n - 1) Σ (s_i - R l_i)²) / Σ l_i (Cochran 1977, 6.3)
    squares = np.square(sums - ratio * lengths)
    return float(math.sqrt(count / (count - 1) * squares.sum()) / total)


def ratio_intervals(
    sums: np.ndarray, lengths: np.ndarray, seed: int = 0
) -> list[tuple[float, float]]:
    """Compute percentile bootstrap intervals of Σ sums / Σ lengths, all from the same resamples."""
    count = len(lengths)
    totals = np.column_stack([sums, lengths])
    generator = np.random.default_rng(seed)
    values, counts = np.unique(totals, axis=0, return_counts=True)
    if len(values) < _FEW_VALUES:  # a resample is a multinomial draw of how often each occurs
        means = generator.multinomial(count, counts / count, size=NUM_RESAMPLES) @ values
    else:
        resamples = []
        for _ in range(NUM_RESAMPLES):
            draw = generator.integers(count, size=count)
            resamples.append(np.bincount(draw, minlength=count) @ totals)
        means = np.stack(resamples)
    ratios = means[:, :-1] / means[:, -1:]
    tail = (1 - CONFIDENCE) / 2
    lows, highs = np.quantile(ratios, (tail, 1 - tail), axis=0).tolist()
    return list(zip(lows, highs, strict=True))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of several tests (Holm 1979), so that one below 5 % is news of all."""
    values = np.asarray(p_values, dtype=np.float64)
    order = values.argsort(kind="stable")
    # the i-th smallest of m is multiplied by m - i + 1, and none may be below a smaller one's
    multiplied = np.minimum(1, values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(multiplied)
    return adjusted.tolist()


def _sides(names: Sequence[str]) -> dict[str, list[str]]:
    """Whom a name stands for in a comparison: each adapter for itself, a stem for its seeds."""
    stems: dict[str, list[str]] = {}
    for name in names:
        match = _SEED.fullmatch(name)
        if match and not is_sum(name):
            stems.setdefault("".join(match.groups()), []).append(name)
    for stem, seeds in stems.items():
        if stem in (*names, BASE):
            raise ConfigError(
                f"adapter name {stem!r} is also the name of the seeds {', '.join(seeds)}; choose "
                "another name"
            )
    return {**{name: [name] for name in names}, **stems}


def seed_groups(names: Sequence[str]) -> dict[str, list[str]]:
    """Find adapters that are seeds of one thing; a single seed is no group."""
    return {stem: seeds for stem, seeds in _sides(names).items() if len(seeds) > 1}


def members_of(name: str, names: Sequence[str]) -> list[str]:
    sides = _sides(names)
    if name not in sides:
        listed = ", ".join(sides)
        raise ConfigError(f"a side of a comparison must be one of {listed}, got {name!r}")
    return sides[name]


def choose_pairs(adapters: Sequence[str | None], requested: Sequence[str] = ()) -> list[Pair]:
    """Decide whom to compare: seeds as their group, the others as they are."""
    names = [name or BASE for name in adapters]
    if requested:
        sides = _sides(names)
        return [_parse_pair(text, sides) for text in dict.fromkeys(requested)]
    contestants = dict.fromkeys(names)
    for stem, seeds in seed_groups(names).items():
        contestants = dict.fromkeys(stem if name in seeds else name for name in contestants)
    has_base = BASE in contestants
    contestants.pop(BASE, None)
    pairs = [(name, BASE) for name in contestants if has_base]
    if len(contestants) <= MAX_FOR_ALL_PAIRS:
        pairs += combinations(contestants, 2)
    return pairs


def _parse_pair(text: str, sides: Mapping[str, Sequence[str]]) -> Pair:
    for colon in re.finditer(":", text):  # a sum's name has colons too
        first = text[: colon.start()]
        second = text[colon.end() :]
        if first in sides and second in sides and sides[first] != sides[second]:
            return first, second
    raise ConfigError(f"--compare must be FIRST:SECOND, two of {', '.join(sides)}, got {text!r}")


def check_scored(adapters: Sequence[str | None], pairs: Sequence[Pair]) -> None:
    if not adapters:
        raise AdapterError("adapters must name at least one, or None for the base model, got none")
    if BASE in adapters:
        raise AdapterError(f"{BASE!r} is reserved for the base model; choose another adapter name")
    names = [name or BASE for name in adapters]
    for first, second in pairs:
        members_of(first, names)
        members_of(second, names)


def seed_values(values: Mapping[str, Sequence[int | float]], name: str) -> list[float]:
    """A contestant's value of each item: an adapter's own, or the mean over a group of seeds."""
    columns = [values[member] for member in members_of(name, list(values))]
    return [fmean(item) for item in zip(*columns, strict=True)]


def compare(answers: TaskAnswers, first: str, second: str, seed: int = 0) -> PairedComparison:
    """Compare two adapters or groups of seeds on a task, as `compare_paired` does.

    Args:
        answers: Answers of both, as `read_answers` returns them.
        first: Name of an adapter or of a group of seeds, or `base`.
        second: Name of another.
        seed: Random seed for the bootstrap.

    Raises:
        ConfigError: If the answers have no such name.
    """
    values = answers.right
    return compare_paired(seed_values(values, first), seed_values(values, second), seed)


def summarise_seeds(tasks: Sequence[TaskAnswers]) -> dict[str, dict[str, Any]]:
    """Return the mean and the sample standard deviation over seeds, by group and task."""
    means = {}
    for task in tasks:
        means[task.task] = {adapter: fmean(right) for adapter, right in task.right.items()}
    return seed_means(means)


def seed_means(figures: Mapping[str, Mapping[str, int | float]]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for task, by_adapter in figures.items():
        for stem, members in seed_groups(list(by_adapter)).items():
            values = [by_adapter[name] for name in members]
            group = summary.setdefault(stem, {"adapters": members, "tasks": {}})
            group["tasks"][task] = {
                "mean": fmean(values),
                "sd": stdev(values),
                "num_seeds": len(values),
            }
    return summary


def read_answers(*paths: str | Path) -> list[TaskAnswers]:
    """Read the answers in files of `loraloom eval --per-question`, joined by task.

    With `--harness`, each filter of lm-eval is a separate task. A `score` replaces `correct`.

    Args:
        *paths: Files, which may contain different adapters or tasks.

    Raises:
        DataError: If a file is missing or damaged, or its task has no right answers, if adapters of
            a task have different questions, or an adapter has two answers to a question.
    """
    from pandas import DataFrame

    files = [local_path(path, "a data file", DataError) for path in paths]
    rows = [_read_answer(row) for file in files for row in read_rows(file)]
    answers = DataFrame(rows, columns=_COLUMNS, dtype=object)
    return [_join(str(task), rows) for task, rows in answers.groupby("task", sort=False)]


def _read_answer(row: Row) -> tuple[Any, ...]:
    # what `loraloom generate` wrote and a judge scored has users' columns
    fields = {} if "completion" in row else row
    name = row["adapter"]
    adapter = json.dumps(name) if isinstance(name, list) else row.text("adapter")  # of weights
    index = fields.get("index")
    if not isinstance(index, int | None):
        row.reject(f"field 'index' must be an integer, got {shown(index)}")
    kind = "score" if "score" in row else "correct"
    mark: Any = row.get(kind)
    if kind == "correct" and not isinstance(mark, bool):
        row.reject(f"field 'correct' must be true or false, got {mark!r}")
    if not isinstance(mark, int | float):
        row.reject(f"field 'score' must be a number, got {mark!r}")
    return _task_of(row, fields), adapter, index, _question_of(row), kind, mark


def _task_of(row: Row, fields: Mapping[str, Any]) -> str:
    task = "judged"
    for column in ("dataset", "task"):
        if column in fields:
            task = row.text(column)
    filter_name = fields.get("filter", "none")
    return task if filter_name == "none" else f"{task},{filter_name}"


def _question_of(row: Row) -> str:
    for column in ("question", "prompt", "messages"):
        if column in row:
            question = row[column]
            return question if isinstance(question, str) else json.dumps(question)
    return ""


def _join(task: str, rows: Any) -> TaskAnswers:
    """Sort a task's part of the data frame by question."""
    if rows["kind"].nunique() > 1:
        raise DataError(f"{task}: score all rows or none, got a score in some of them")
    # without an index, questions are numbered by their texts, which may be repeated
    repeat = rows.groupby(["adapter", "question"]).cumcount()
    numbers = rows.groupby(["question", repeat], sort=False).ngroup()
    rows = rows.assign(index=rows["index"].where(rows["index"].notna(), numbers))
    rows = rows.drop_duplicates()
    repeated = rows["adapter"][rows.duplicated(["adapter", "index", "question"])]
    if len(repeated):
        raise DataError(
            f"{task}: {repeated.iloc[0]!r} must answer a question once, got different answers; "
            "give each adapter a different name"
        )
    table = rows.pivot(index=["index", "question"], columns="adapter", values="mark")
    lacking = table.columns[table.isna().any()]
    if len(lacking):
        raise DataError(
            f"{task}: adapters must have answered the same questions, but {', '.join(lacking)} "
            "lack some; use files of the same split and limit"
        )
    right = {adapter: tuple(table[adapter].tolist()) for adapter in rows["adapter"].unique()}
    return TaskAnswers(task, tuple(table.index.get_level_values("index").tolist()), right)
