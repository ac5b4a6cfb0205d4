"""An evaluation of adapters: scored on choice tasks or held-out rows, compared, written down.

evaluation = evaluate(host, tokenizer, ["arc_easy"], data="data", limit=200)
evaluation.results["math"]["arc_easy"]["accuracy"]
evaluation = evaluate_loss(host, tokenizer, {"dataset": "held_out.jsonl", "format": "chat"})
evaluation.results["math"]["held_out"]["perplexity"]
evaluation.write("result.json")
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import Scoring, SourceConfig
from loraloom.config.paths import local_path
from loraloom.data.tasks import QuestionSet, find_task, load_question_set
from loraloom.data.tokens import NO_LOSS, Example, TokenPair
from loraloom.durable import write_output
from loraloom.errors import ConfigError
from loraloom.eval.cache import ScoreCache, Tokens
from loraloom.eval.comparison import (
    BASE,
    Comparison,
    Pair,
    adjusted,
    check_scored,
    choose_pairs,
    seed_means,
)
from loraloom.eval.held_out import HeldOutSet, load_held_out
from loraloom.eval.moe_peft import check_tasks, encode_last_tokens, with_all_labels
from loraloom.eval.progress import EvaluationProgress, question_size
from loraloom.eval.protocol import encode_choices, score_kept, score_questions
from loraloom.eval.provenance import describe_evaluation, describe_questions
from loraloom.eval.results import SCHEMA_VERSION
from loraloom.eval.routing import RoutingTally, summarise_routing
from loraloom.eval.scores import HeldOutLosses, PairLosses, Scores, TaskScores, summarise
from loraloom.eval.tables import check_outputs, data_frame, evaluation_tables, markdown_page
from loraloom.generation.rows import example_row
from loraloom.models.host import Host
from loraloom.training.settings import DpoConfig

if TYPE_CHECKING:
    from pandas import DataFrame

Compat = Literal["moe-peft"]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave.

    Args:
        tasks: Each data set's scores of every item, by adapter.
        pairs: Adapters, or groups of seeds, to compare.
        details: Where mixtures sent the tokens, and how the scores were got: what stands beside
            `results` in the JSON file.
    """

    tasks: Sequence[Scores]
    pairs: Sequence[Pair]
    details: dict[str, Any]

    @classmethod
    def join(
        cls, parts: Sequence[Evaluation], names: Sequence[str | None], pairs: Sequence[Pair]
    ) -> Evaluation:
        """Make one of several, as if all adapters had been scored together."""
        known = [name or BASE for name in names]
        scored: Any = parts[0].tasks
        tasks = [
            replace(task, scores=_joined([part.tasks[place].scores for part in parts], known))
            for place, task in enumerate(scored)
        ]
        details = {
            **parts[0].details,
            "num_cached_scores": sum(part.details["num_cached_scores"] for part in parts),
        }
        for field in ("routing", "adapters"):
            details[field] = _joined([part.details[field] for part in parts], known)
        return cls(tasks, pairs, details)

    @cached_property
    def results(self) -> dict[str, dict[str, Any]]:
        """Figures by adapter (`base` is the base model) and task, as in the JSON file."""
        return summarise(self.tasks)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Adapters compared on the same items, their p-values adjusted for all of them."""
        return adjusted(
            [
                (task.name, *pair, task.compare(*pair), task.metric)
                for task in self.tasks
                for pair in self.pairs
            ]
        )

    @property
    def seeds(self) -> dict[str, dict[str, Any]]:
        """Adapters `NAME@SEED` summed up over seeds."""
        return seed_means(
            {task.name: {name: task.figure(name) for name in task.scores} for task in self.tasks}
        )

    def tables(self) -> list[Table]:
        """Make every table that there is something for, in the order to show them."""
        return evaluation_tables(self.results, self.seeds, self.comparisons)

    def frame(self) -> DataFrame:
        """Lay the results out in rows: an adapter, a task, a group of questions, and figures."""
        return data_frame(self.results)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield what `--per-question` writes, a line for each adapter and item."""
        return chain.from_iterable(task.lines() for task in self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Everything, as it stands in the JSON file."""
        return {
            "schema_version": SCHEMA_VERSION,
            "results": self.results,
            "seeds": self.seeds,
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            **self.details,
        }

    def write(self, path: str | Path) -> None:
        """Write a .json, .csv or .md file.

        Raises:
            ConfigError: If the suffix is another one, or the file can't be written.
        """
        path = Path(path)
        check_outputs([path])
        match path.suffix.lower():
            case ".csv":
                write_output(path, self.frame().to_csv(index=False, lineterminator="\n"))
            case ".md":
                write_output(path, markdown_page(self.tables(), self.details))
            case _:
                write_json(path, self.to_json())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write results."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_output(path, f"{text}\n")


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write lines of JSON, such as those of `Evaluation.lines`."""
    texts = (json.dumps(line, ensure_ascii=False, allow_nan=False) for line in lines)
    write_output(path, "".join(f"{text}\n" for text in texts))


def _joined(parts: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    found = {name: value for part in parts for name, value in part.items()}
    return {name: found[name] for name in names if name in found}


class _Pass:
    """Adapters that are scored together on one data set after another; options of `evaluate`."""

    def __init__(
        self,
        host: Host,
        tokenizer: PreTrainedTokenizerBase,
        adapters: Sequence[str | None] | None,
        *,
        pairs: Sequence[Pair] | None = None,
        cache: ScoreCache | None = None,
        max_tokens_per_batch: int | None = None,
        progress: EvaluationProgress | None = None,
        sources: Mapping[str, str] | None = None,
        command: str = "",
    ):
        self.host = host
        self.tokenizer = tokenizer
        self.names = [None, *host.adapters] if adapters is None else list(adapters)
        self.pairs = choose_pairs(self.names) if pairs is None else pairs
        check_scored(self.names, self.pairs)
        self._cache = cache
        self._max_tokens = max_tokens_per_batch
        self._progress = progress
        self._sources = sources or {}
        self._command = command
        self._tally = RoutingTally(host, self.names, tokenizer)

    def ask(self, asked: QuestionSet, compat: Compat | None) -> TaskScores:
        """Score a task's questions."""
        progress, questions = self._progress, asked.questions
        scores = score_questions(
            self.host,
            self.tokenizer,
            questions,
            self.names,
            self._max_tokens,
            progress and progress.start(asked.task, [*map(question_size, questions)]),
            encode_choices if compat is None else encode_last_tokens,
            self._cache,
            self._tally.of(asked.task, [question.group for question in questions]),
        )
        by_name = {name or BASE: of_name for name, of_name in scores.items()}
        found = TaskScores(asked.task, asked.split, by_name, describe_questions(asked))
        found.check_finite()
        return found

    def measure(self, data: HeldOutSet) -> HeldOutLosses | PairLosses:
        """Compute the losses of a data set's rows."""
        names, progress = self.names, self._progress
        if data.has_pairs and None not in names:  # whose rewards are relative to the base model
            names = [None, *names]
        scores = score_kept(
            self.host,
            [[example_row(one) for one in examples] for examples in data.rows],
            [_known_by(examples) for examples in data.rows],
            names,
            self._max_tokens,
            progress and progress.start(data.name, data.num_tokens, "rows"),
            self._cache,
            self._tally.of(data.name),
        )
        losses = {
            name or BASE: [-scores[name, place][0] for place in range(len(data.rows))]
            for name in names
        }
        asked = {name or BASE: losses[name or BASE] for name in self.names}
        found = (
            PairLosses(data, asked, losses[BASE]) if data.has_pairs else HeldOutLosses(data, asked)
        )
        found.check_finite()
        return found

    def evaluation(self, tasks: Sequence[Scores], **more: Any) -> Evaluation:
        """Note how the scores of all data sets were got."""
        sizes = {task.name: len(next(iter(task.scores.values()))) for task in tasks}
        details = {
            "routing": summarise_routing(self._tally, self.tokenizer, sizes),
            **describe_evaluation(self.host, self._sources, self._command),
            "tasks": {task.name: task.details for task in tasks},
            **more,
            "num_cached_scores": 0 if self._cache is None else self._cache.num_found,
        }
        return Evaluation(tasks, self.pairs, details)


def _known_by(examples: Sequence[Example]) -> Tokens:
    """What a row's kept loss is known by: no question has NO_LOSS in a context, so none is it."""
    return [TokenPair([NO_LOSS, *one.input_ids], list(one.labels)) for one in examples]


def evaluate(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] | Sequence[QuestionSet],
    adapters: Sequence[str | None] | None = None,
    *,
    scoring: Scoring | None = None,
    split: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    compat: Compat | None = None,
    **options: Any,
) -> Evaluation:
    """Score choice tasks with several adapters, all in one pass, and compare them.

    Args:
        host: With the adapters; it is left in its mode.
        tokenizer: The base model's.
        tasks: Names of tasks, .yaml files of your own, or what `load_question_sets` gives.
        adapters: Names; None is the base model. By default the base model and all on the host.
        scoring: Of tasks by name, `label` or `text`.
        split: Of the data; by default the one that papers report.
        data: A directory of data sets, or of a single task's own; the hub's copy by default.
        limit: Most questions of a task.
        compat: Whose way of scoring to repeat; None for loraloom's own.
        options: `pairs`, whom to compare (everybody with the base model, and few with each other);
            `max_tokens_per_batch`, padding and all adapters included (1,024 on a CPU, 16,384
            elsewhere); `cache`, a ScoreCache; `progress`; `sources` of adapters by name and the
            `command`, to be noted.

    Raises:
        ConfigError: If a task is unknown, or options exclude each other.
        DataError: If a task's data is missing or damaged, or a question doesn't fit the model.
        AdapterError: If the host lacks an adapter, or its scores are not finite.
    """
    scored = _Pass(host, tokenizer, adapters, **options)
    named = [tasks] if isinstance(tasks, str) else [task for task in tasks if isinstance(task, str)]
    asked = [task for task in tasks if isinstance(task, QuestionSet)]
    asked += load_question_sets(named, scoring, split, data, limit, compat)
    if not asked:
        raise ConfigError("tasks must name at least one, got none")
    found = [scored.ask(task, compat) for task in asked]
    return scored.evaluation(found, compat=compat)


def evaluate_loss(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    data: SourceConfig | Mapping[str, Any] | Sequence[HeldOutSet],
    adapters: Sequence[str | None] | None = None,
    *,
    max_length: int | None = None,
    limit: int | None = None,
    beta: float = DpoConfig.model_fields["beta"].default,
    **options: Any,
) -> Evaluation:
    """Compute the loss of several adapters on held-out rows, all in one pass, and compare them.

    Args:
        host: With the adapters.
        tokenizer: The base model's.
        data: As under `data:` in a run file, `{"dataset": ..., "format": ...}` or `{"task": ...}`;
            or a list of what `load_held_out` gives. Preference pairs are ranked.
        adapters: Names; None is the base model. By default the base model and all on the host.
        max_length: Longest row in tokens; None for the default of training, or what the model
            takes if that is less.
        limit: Most rows to take from the beginning.
        beta: Of preference pairs: what DPO multiplies log-ratios to the base model with.
        options: As of `evaluate`.

    Raises:
        ConfigError: If the data set's settings are wrong.
        DataError: If it is missing or damaged, or no row fits.
        AdapterError: If the host lacks an adapter, or its losses are not finite.
    """
    scored = _Pass(host, tokenizer, adapters, **options)
    sets = (
        [load_held_out(host, tokenizer, data, max_length, limit, beta)]
        if isinstance(data, SourceConfig | Mapping)
        else list(data)
    )
    if not sets:
        raise ConfigError("data must have a data set at least, got none")
    return scored.evaluation([scored.measure(one) for one in sets])


def load_question_sets(
    tasks: Sequence[str],
    scoring: Scoring | None = None,
    split: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    compat: Compat | None = None,
) -> list[QuestionSet]:
    """Load the questions of tasks."""
    names = [find_task(task).name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"tasks must have different names, got {', '.join(names)}")
    if compat is not None:
        if scoring == "text":
            raise ConfigError(f"compat {compat} scores labels; leave out scoring {scoring}")
        check_tasks(tasks)
    if data is not None and len(tasks) > 1:
        _check_directories(local_path(data, "data"), names)
    loaded = [load_question_set(task, scoring, split, data, limit) for task in tasks]
    if compat is None:
        return loaded
    return [replace(task, questions=[*map(with_all_labels, task.questions)]) for task in loaded]


def _check_directories(data: Path, names: Sequence[str]) -> None:
    """Check that several tasks don't read the data of one."""
    absent = [name for name in names if not (data / name).is_dir()]
    if absent:
        raise ConfigError(
            f"data must be a directory with one for each of several tasks, got {data} without "
            f"{', '.join(absent)}"
        )
