"""An evaluation of adapters on choice tasks: scored, compared, and written down.

evaluation = evaluate(host, tokenizer, ["arc_easy"], data="data", limit=200)
evaluation.results["math"]["arc_easy"]["accuracy"]
evaluation.write("result.json")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.table import Table
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import Scoring
from loraloom.config.paths import local_path
from loraloom.data.questions import QuestionSet, load_question_set
from loraloom.data.tasks import find_task
from loraloom.errors import ConfigError
from loraloom.eval.answers import answers_of
from loraloom.eval.cache import ScoreCache
from loraloom.eval.comparison import (
    Comparison,
    Pair,
    check_scored,
    choose_pairs,
    compare_all,
    summarise_seeds,
)
from loraloom.eval.moe_peft import check_tasks, encode_last_tokens, with_all_labels
from loraloom.eval.progress import EvaluationProgress, question_size
from loraloom.eval.protocol import encode_choices, score_questions
from loraloom.eval.provenance import describe_evaluation
from loraloom.eval.results import TaskScores, check_finite, summarise
from loraloom.eval.routing import RoutingTally, summarise_routing
from loraloom.eval.tables import all_tables, csv_page
from loraloom.eval.writing import as_document, write_evaluation
from loraloom.models.host import Host

Compat = Literal["moe-peft"]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave.

    Args:
        tasks: Each task's scores of every question, by adapter.
        seeds: Adapters `NAME@SEED` summed up over seeds.
        comparisons: Adapters compared on the same questions.
        details: Where mixtures sent the tokens, and how the scores were got: what stands beside
            `results` in the JSON file.
    """

    tasks: list[TaskScores]
    seeds: dict[str, Any]
    comparisons: list[Comparison]
    details: dict[str, Any]

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Accuracies by adapter (`base` is the base model) and task, as in the JSON file."""
        return summarise(self.tasks)

    def tables(self) -> list[Table]:
        """Make every table that there is something for, in the order to show them."""
        return all_tables(self.tasks, self.seeds, self.comparisons)

    def write(self, path: str | Path) -> None:
        """Write a .json, .csv or .md file.

        Raises:
            ConfigError: If the suffix is another one, or the file can't be written.
        """
        write_evaluation(Path(path), self.to_json(), self.tables(), lambda: csv_page(self.tasks))

    def to_json(self) -> dict[str, Any]:
        """Everything, as it stands in the JSON file."""
        return as_document(self.results, self.seeds, self.comparisons, self.details)


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
    pairs: Sequence[Pair] | None = None,
    cache: ScoreCache | None = None,
    max_tokens_per_batch: int | None = None,
    progress: EvaluationProgress | None = None,
    sources: Mapping[str, str] | None = None,
    command: str = "",
) -> Evaluation:
    """Score choice tasks with several adapters, all in one pass, and compare them.

    Args:
        host: With the adapters; it is left in its mode.
        tokenizer: The base model's.
        tasks: Names of tasks, .yaml files of your own, or what `load_question_sets` gives.
        adapters: Names; None is the base model. By default the base model and all on the host.
        scoring: Of tasks by name; see `load_question_sets`.
        split: Likewise.
        data: Likewise.
        limit: Likewise.
        compat: Whose way of scoring to repeat; None for loraloom's own.
        pairs: Whom to compare; see `choose_pairs` for the default.
        cache: Scores that are known, and where new ones are kept.
        max_tokens_per_batch: Tokens of a batch, padding and all adapters included. None: 1,024 on a
            CPU, 16,384 elsewhere.
        progress: Shows how it gets on.
        sources: Directory or hub id of adapters by name, to be noted with their hashes.
        command: What started it, to be noted.

    Raises:
        ConfigError: If a task is unknown, or options exclude each other.
        DataError: If a task's data is missing or damaged, or a question doesn't fit the model.
        AdapterError: If the host lacks an adapter, or its scores are not finite.
    """
    names = [None, *host.adapters] if adapters is None else list(adapters)
    pairs = choose_pairs(names) if pairs is None else pairs
    check_scored(names, pairs)
    named = [tasks] if isinstance(tasks, str) else [task for task in tasks if isinstance(task, str)]
    question_sets = [task for task in tasks if isinstance(task, QuestionSet)]
    question_sets += load_question_sets(named, scoring, split, data, limit, compat)
    if not question_sets:
        raise ConfigError("tasks must name at least one, got none")
    tally = RoutingTally(host, names, tokenizer)
    scored: list[TaskScores] = []
    for task in question_sets:
        scores = score_questions(
            host,
            tokenizer,
            task.questions,
            names,
            max_tokens_per_batch,
            progress and progress.start(task.task, [*map(question_size, task.questions)]),
            encode_choices if compat is None else encode_last_tokens,
            cache,
            tally.of(task.task, [question.group for question in task.questions]),
        )
        scored.append(TaskScores(task.task, task.split, scores))
        check_finite(scored[-1])
    answers = [answers_of(task) for task in scored]
    num_questions = {task.task: len(task.questions) for task in question_sets}
    details = {
        "routing": summarise_routing(tally, tokenizer, num_questions),
        **describe_evaluation(host, sources or {}, question_sets, command),
        "compat": compat,
        "num_cached_scores": 0 if cache is None else cache.num_found,
    }
    return Evaluation(scored, summarise_seeds(answers), compare_all(answers, pairs), details)


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
