"""An evaluation of adapters: scored on choice tasks or held-out rows, and compared.

evaluation = evaluate(host, tokenizer, ["arc_easy"], data="data", limit=200)
evaluation.results["math"]["arc_easy"]["accuracy"]
evaluation = evaluate_loss(host, tokenizer, {"dataset": "held_out.jsonl", "format": "chat"})
evaluation.results["math"]["held_out"]["perplexity"]
evaluation.write("result.json")
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import Scoring, SourceConfig, skills_lands, task_name
from loraloom.config.text import local_path
from loraloom.data.tasks import QuestionSet, find_task, load_question_set
from loraloom.data.tokens import NO_LOSS, TokenPair
from loraloom.errors import ConfigError, not_finite
from loraloom.eval import generated_answers
from loraloom.eval.cache import ScoreCache, describe_adapters, describe_evaluation
from loraloom.eval.generated_answers import AnswerSet
from loraloom.eval.held_out import BETA, HeldOutSet, load_held_out, pair_scores, row_scores
from loraloom.eval.results import BASE, SCHEMA_VERSION, Comparison, Evaluation, check_limit
from loraloom.eval.routing import RoutingTally
from loraloom.eval.score import Scorer, Scores, score_questions, task_scores, with_all_labels
from loraloom.eval.statistics import Pair, check_scored, choose_pairs, holm, seed_means
from loraloom.generation.scoring import example_row
from loraloom.host.host import Host
from loraloom.terminal import show_progress

Asked = QuestionSet | AnswerSet


def summarise(scores: Sequence[Scores], pairs: Sequence[Pair], **details: Any) -> Evaluation:
    """Compute figures, means over seeds and comparisons of all that was scored."""
    results = {name: {one.name: one.results[name] for one in scores} for name in scores[0].results}
    figure = lambda one: one.get("loss", one.get("score", one.get("accuracy")))  # noqa: E731
    figures = {t.name: {n: figure(of[t.name]) for n, of in results.items()} for t in scores}
    # Holm's adjustment is over all tasks: whoever looks for the significant one looks at all
    found = [(task, *pair, task.compare(*pair)) for task in scores for pair in pairs]
    adjusted = holm([one.p_value for *_, one in found])
    comparisons = [
        Comparison(
            **vars(one), task=task.name, metric=task.metric, first=first, second=second,
            adjusted_p_value=p_value,
        )
        for (task, first, second, one), p_value in zip(found, adjusted, strict=True)
    ]  # fmt: skip
    return Evaluation(
        schema_version=SCHEMA_VERSION,
        results=results,
        seeds=seed_means(figures),
        comparisons=comparisons,
        scores=list(scores),
        **details,
    )


@dataclass
class _Pass:
    """Adapters that are scored together on one data set after another; options of `evaluate`."""

    host: Host
    tokenizer: PreTrainedTokenizerBase
    adapters: Sequence[str | None] | None
    _: KW_ONLY
    pairs: Sequence[Pair] | None = None
    cache: ScoreCache | None = None
    max_tokens_per_batch: int | None = None
    console: Console | None = None
    sources: Mapping[str, str] | None = None
    command: str = ""
    compat: Literal["moe-peft"] | None = None

    def __post_init__(self) -> None:
        names = [self.adapters] if isinstance(self.adapters, str) else self.adapters
        self.names = [None, *self.host.adapters] if names is None else list(names)
        self.compared = choose_pairs(self.names) if self.pairs is None else self.pairs
        check_scored(self.names, self.compared)
        if self.cache is not None:
            self.cache.begin()
        self.scorer = Scorer(self.host, self.names, self.max_tokens_per_batch, self.cache)
        # as they are now: while a job trains, checkpoints are replaced
        self.described = describe_adapters(self.sources or {})
        self.tally = RoutingTally(self.host, self.names, self.tokenizer)

    def ask(self, asked: Asked) -> Scores:
        if self.compat and (isinstance(asked, AnswerSet) or asked.scoring != "label"):
            raise ConfigError(f"compat {self.compat} requires choice tasks with scoring: label")
        if isinstance(asked, AnswerSet):
            return self._answer(asked)
        if self.compat is not None:
            asked = replace(asked, questions=[with_all_labels(one) for one in asked.questions])
        questions = asked.questions
        # characters that the model reads: different contexts once, and every continuation
        sizes = [sum(map(len, {*one.contexts, *one.continuations})) for one in questions]
        observe = self.tally.of(asked.task, len(questions), [one.group for one in questions])
        score = partial(score_questions, self.scorer, self.tokenizer, questions, on_routing=observe)
        with show_progress(self.console, asked.task, sizes) as advance:
            scores = score(last_tokens=self.compat is not None, on_progress=advance)
        places = [f"in {asked.task}, question {question.index}" for question in questions]
        values = {name: [one.log_likelihoods for one in of] for name, of in scores.items()}
        _check_finite("scores", values, places)
        return task_scores(asked, {name or BASE: of_name for name, of_name in scores.items()})

    def _answer(self, asked: AnswerSet) -> Scores:
        if asked.judged is not None:
            return generated_answers.judged_scores(
                asked, asked.judged, [x or BASE for x in self.names]
            )
        sizes = [1] * len(asked.rows) * len(self.names)
        with show_progress(self.console, asked.task, sizes) as advance:
            generate = partial(
                generated_answers.generate_answers, self.scorer, self.tokenizer, asked
            )
            texts = {name or BASE: generate(name, advance) for name in self.names}
        return generated_answers.answer_scores(asked, texts)

    def measure(self, data: HeldOutSet) -> Scores:
        scorer = self.scorer
        if data.has_pairs and None not in self.names:  # rewards are relative to the base model
            scorer = replace(scorer, adapters=[None, *self.names])
        size = 2 if data.has_pairs else 1
        observe = self.tally.of(data.name, len(data.rows) // size, rows_per_question=size)
        rows = [[example_row(one) for one in examples] for examples in data.rows]
        # no question has NO_LOSS in a context, so none is taken for a row
        keys = [[TokenPair([NO_LOSS, *x.input_ids], list(x.labels)) for x in y] for y in data.rows]
        with show_progress(self.console, data.name, data.num_tokens) as advance:
            scores = scorer.score(rows, keys, advance, observe)
        places = [f"in row {place + 1} of {data.name}" for place in data.places]
        _check_finite("losses", scores, places)
        losses = {name: [-value for (value,) in of_name] for name, of_name in scores.items()}
        asked = {name or BASE: losses[name] for name in self.names}
        return pair_scores(data, asked, losses[None]) if data.has_pairs else row_scores(data, asked)

    def evaluation(self, scores: Sequence[Scores]) -> Evaluation:
        details = describe_evaluation(self.host, self.described, self.command)
        details["tasks"] = {task.name: dict(task.details) for task in scores}
        details["num_cached_scores"] = 0 if self.cache is None else self.cache.num_found
        details |= {"routing": self.tally.summarise(), "compat": self.compat}
        return summarise(scores, self.compared, **details)


def _check_finite(
    what: str, scores: Mapping[str | None, Sequence[Sequence[float]]], places: Sequence[str]
) -> None:
    for name, of_name in scores.items():
        for values, place in zip(of_name, places, strict=True):
            if not all(map(math.isfinite, values)):
                raise not_finite(what, values[0] if len(values) == 1 else values, [name], place)


def evaluate(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Path | Asked | Sequence[str | Path | Asked],
    adapters: Sequence[str | None] | None = None,
    *,
    scoring: Scoring | None = None,
    split: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    **options: Any,
) -> Evaluation:
    """Score choice tasks and generated answers of several adapters, and compare them.

    Args:
        host: Base model with the adapters.
        tokenizer: Tokenizer of the base model.
        tasks: Names of tasks, your own .yaml files, or results of `load_question_sets`.
        adapters: Names of adapters; None is the base model. Default: the base model and all.
        scoring: Scoring of tasks by name, `label` or `text`.
        split: Split of the data; by default the one that papers report.
        data: Directory of data sets, or of a single task; by default the copy on the Hub.
        limit: Maximum number of questions of a task.
        **options: `pairs` to compare (by default each with the base model, and few adapters with
            each other); `max_tokens_per_batch`, padding and all adapters included (1,024 on a CPU,
            16,384 elsewhere); `cache`, a ScoreCache; `console` to show progress on; `sources` of
            adapters by name and `command`, both recorded; `compat="moe-peft"` to score the last
            token of each label that MoE-PEFT knows for the task, as it does.

    Raises:
        ConfigError: If a task is unknown, or options exclude each other.
        DataError: If a task's data is missing or damaged, or a question doesn't fit the model.
        AdapterError: If the host lacks an adapter, or its scores are not finite.
    """
    scored = _Pass(host, tokenizer, adapters, **options)
    given = [tasks] if isinstance(tasks, str | Path | Asked) else tasks
    asked = [task for task in given if isinstance(task, Asked)]
    named = [str(task) for task in given if not isinstance(task, Asked)]
    asked += load_question_sets(named, scoring, split, data, limit)
    _check_differ("tasks", [one.task for one in asked])
    if not asked:
        raise ConfigError("tasks must contain at least one task, got none")
    return scored.evaluation([scored.ask(task) for task in asked])


def evaluate_loss(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    data: SourceConfig | Mapping[str, Any] | Sequence[HeldOutSet] | Iterator[HeldOutSet],
    adapters: Sequence[str | None] | None = None,
    *,
    max_length: int | None = None,
    limit: int | None = None,
    beta: float = BETA,
    **options: Any,
) -> Evaluation:
    """Compute the loss of several adapters on held-out rows, all in one pass, and compare them.

    Args:
        host: Base model with the adapters.
        tokenizer: Tokenizer of the base model.
        data: Source as under `data:` in a run file, `{"dataset": ..., "format": ...}` or
            `{"task": ...}`, or results of `load_held_out`. Preference pairs are ranked.
        adapters: Names of adapters; None is the base model. Default: the base model and all.
        max_length: Longest row in tokens; None for the default of training, or the model's
            maximum if that is less.
        limit: Maximum number of rows, from the beginning.
        beta: Factor of DPO's rewards, for preference pairs.
        **options: Options of `evaluate`.

    Raises:
        ConfigError: If the data set's settings are wrong.
        DataError: If it is missing or damaged, or no row fits.
        AdapterError: If the host lacks an adapter, or its losses are not finite.
    """
    scored = _Pass(host, tokenizer, adapters, **options)
    if isinstance(data, SourceConfig | Mapping):
        data = [load_held_out(host, tokenizer, data, max_length, limit, beta)]
    sets = list(data)
    if not sets:
        raise ConfigError("data must have at least one data set, got none")
    _check_differ("data sets", [one.name for one in sets])
    return scored.evaluation([scored.measure(one) for one in sets])


def load_question_sets(
    tasks: Sequence[str],
    scoring: Scoring | None = None,
    split: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
) -> list[Asked]:
    check_limit(limit)
    _check_differ("tasks", [task_name(task) for task in tasks])
    answered = {
        task: one
        for task in tasks
        if (one := generated_answers.load_answer_set(task, split, limit))
    }
    without = [task for task, asked in answered.items() if asked.details.get("split") is None]
    if split and without:
        raise ConfigError(
            f"files of {', '.join(without)} have no splits. Remove split={split}, or score other "
            "tasks separately."
        )
    if answered and (scoring or data):
        raise ConfigError(f"scoring and data are for choice tasks, got {', '.join(answered)}")
    choices = [find_task(task) for task in tasks if task not in answered]
    reading = [one.name for one in choices if not skills_lands(one.name)]  # no generated ones
    # several must not all read the data of one
    several = reading if data is not None and len(reading) > 1 else ()
    if absent := [name for name in several if not (local_path(data or "", "data") / name).is_dir()]:
        needed = f"data must be a directory with a subdirectory per task, got {data}"
        raise ConfigError(f"{needed} without {', '.join(absent)}")
    places = {task: None if reading and skills_lands(task) else data for task in tasks}
    return [
        answered.get(task) or load_question_set(task, scoring, split, places[task], limit)
        for task in tasks
    ]


def _check_differ(what: str, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise ConfigError(f"{what} must have different names, got {', '.join(names)}")
