"""An evaluation of adapters: scored on choice tasks or held-out rows, and compared.

evaluation = evaluate(host, tokenizer, ["arc_easy"], data="data", limit=200)
evaluation.results["math"]["arc_easy"]["accuracy"]
evaluation = evaluate_loss(host, tokenizer, {"dataset": "held_out.jsonl", "format": "chat"})
evaluation.results["math"]["held_out"]["perplexity"]
evaluation.write("result.json")
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from loraloom.config.data import Scoring, SourceConfig
from loraloom.config.text import local_path
from loraloom.data.tasks import QuestionSet, find_task, load_question_set
from loraloom.data.tokens import NO_LOSS, Example, TokenPair
from loraloom.errors import ConfigError, not_finite
from loraloom.eval.cache import LogLikelihoods, ScoreCache
from loraloom.eval.held_out import BETA, HeldOutLosses, HeldOutSet, PairLosses, load_held_out
from loraloom.eval.progress import EvaluationProgress, question_size
from loraloom.eval.provenance import describe_evaluation
from loraloom.eval.results import BASE, SCHEMA_VERSION, Comparison, Evaluation
from loraloom.eval.routing import RoutingTally
from loraloom.eval.score import (
    Scorer,
    Scores,
    TaskScores,
    check_moe_peft_tasks,
    describe_questions,
    encode_choices,
    encode_last_tokens,
    score_questions,
    with_all_labels,
)
from loraloom.eval.statistics import Pair, check_scored, choose_pairs, holm, seed_means
from loraloom.generation.rows import example_row
from loraloom.models.host import Host

Compat = Literal["moe-peft"]


def summarise(scores: Sequence[Scores], pairs: Sequence[Pair], **details: Any) -> Evaluation:
    """Compute figures, means over seeds and comparisons of all that was scored."""
    results: dict[str, dict[str, Any]] = {}
    for task in scores:
        for name, result in task.results().items():
            results.setdefault(name, {})[task.name] = result
    figures = {
        task.name: {
            name: of[task.name].get("loss", of[task.name].get("accuracy"))
            for name, of in results.items()
        }
        for task in scores
    }
    found = [(task, *pair, task.compare(*pair)) for task in scores for pair in pairs]
    adjusted = holm([one.p_value for *_, one in found])
    return Evaluation(
        schema_version=SCHEMA_VERSION,
        results=results,
        seeds=seed_means(figures),
        comparisons=[
            Comparison(
                **asdict(one),
                task=task.name,
                metric=task.metric,
                first=first,
                second=second,
                adjusted_p_value=p_value,
            )
            for (task, first, second, one), p_value in zip(found, adjusted, strict=True)
        ],
        scores=list(scores),
        **details,
    )


def join_evaluations(
    parts: Sequence[Evaluation], names: Sequence[str | None], pairs: Sequence[Pair]
) -> Evaluation:
    """Make one of several, as if all adapters had been scored together."""

    def joined(of_parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        found = {name: value for part in of_parts for name, value in part.items()}
        return {name or BASE: found[name or BASE] for name in names if (name or BASE) in found}

    computed = {"schema_version", "results", "seeds", "comparisons"}
    details = {name: value for name, value in parts[0] if name not in computed}
    details |= {
        "scores": [
            replace(of_task[0], scores=joined(one.scores for one in of_task))
            for of_task in zip(*(part.scores for part in parts), strict=True)
        ],
        "routing": joined(part.routing for part in parts),
        "adapters": joined(part.adapters for part in parts),
        "num_cached_scores": sum(part.num_cached_scores for part in parts),
    }
    return summarise(pairs=pairs, **details)


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
        self.names = [None, *host.adapters] if adapters is None else list(adapters)
        self.pairs = choose_pairs(self.names) if pairs is None else pairs
        check_scored(self.names, self.pairs)
        self._tokenizer = tokenizer
        self._scorer = Scorer(host, self.names, max_tokens_per_batch, cache)
        self._progress = progress
        self._how = (host, sources or {}, command)
        self._tally = RoutingTally(host, self.names, tokenizer)

    def ask(self, asked: QuestionSet, compat: Compat | None) -> TaskScores:
        """Score a task's questions."""
        progress, questions = self._progress, asked.questions
        scores = score_questions(
            self._scorer,
            self._tokenizer,
            questions,
            encode_choices if compat is None else encode_last_tokens,
            on_progress=progress and progress.start(asked.task, [*map(question_size, questions)]),
            on_routing=self._tally.of(asked.task, [question.group for question in questions]),
        )
        for name, of_name in scores.items():
            places = [f"in {asked.task}, question {question.index}" for question in questions]
            _check_finite("scores", name, [one.log_likelihoods for one in of_name], places)
        by_name = {name or BASE: of_name for name, of_name in scores.items()}
        return TaskScores(asked.task, describe_questions(asked), by_name)

    def measure(self, data: HeldOutSet) -> HeldOutLosses | PairLosses:
        """Compute the losses of a data set's rows."""
        scorer, progress = self._scorer, self._progress
        if data.has_pairs and None not in self.names:  # rewards are relative to the base model
            scorer = replace(scorer, adapters=[None, *self.names])
        scores = scorer.score(
            [[example_row(one) for one in examples] for examples in data.rows],
            [_known_by(examples) for examples in data.rows],
            progress and progress.start(data.name, data.num_tokens, "rows"),
            self._tally.of(data.name),
        )
        for name, of_name in scores.items():
            places = [f"in row {place + 1} of {data.name}" for place in data.places]
            _check_finite("losses", name, of_name, places)
        losses = {name: [-value for (value,) in of_name] for name, of_name in scores.items()}
        asked = {name or BASE: losses[name] for name in self.names}
        if data.has_pairs:
            return PairLosses(data.name, data.details, asked, data, losses[None])
        return HeldOutLosses(data.name, data.details, asked, data)

    def evaluation(self, scores: Sequence[Scores], **more: Any) -> Evaluation:
        """Note how the scores of all data sets were got."""
        sizes = {task.name: len(next(iter(task.scores.values()))) for task in scores}
        cache = self._scorer.cache
        return summarise(
            scores,
            self.pairs,
            routing=self._tally.summarise(sizes),
            **describe_evaluation(*self._how),
            tasks={task.name: dict(task.details) for task in scores},
            **more,
            num_cached_scores=0 if cache is None else cache.num_found,
        )


def _check_finite(
    what: str, name: str | None, scores: Sequence[LogLikelihoods], places: Sequence[str]
) -> None:
    """Raise an AdapterError that names who gave a score that is not finite, and where."""
    for values, place in zip(scores, places, strict=True):
        if not all(map(math.isfinite, values)):
            raise not_finite(what, values if len(values) > 1 else values[0], [name], place)


def _known_by(examples: Sequence[Example]) -> list[TokenPair]:
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
    beta: float = BETA,
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
        check_moe_peft_tasks(tasks)
    if data is not None and len(tasks) > 1:  # which must not all read the data of one
        absent = [name for name in names if not (local_path(data, "data") / name).is_dir()]
        if absent:
            raise ConfigError(
                f"data must be a directory with one for each of several tasks, got {data} without "
                f"{', '.join(absent)}"
            )
    loaded = [load_question_set(task, scoring, split, data, limit) for task in tasks]
    if compat is None:
        return loaded
    return [replace(task, questions=[*map(with_all_labels, task.questions)]) for task in loaded]
