"""An evaluation of adapters: scored on choice tasks or held-out rows, and compared.

evaluation = evaluate(host, tokenizer, ["arc_easy"], data="data", limit=200)
evaluation.results["math"]["arc_easy"]["accuracy"]
evaluation = evaluate_loss(host, tokenizer, {"dataset": "held_out.jsonl", "format": "chat"})
evaluation.results["math"]["held_out"]["perplexity"]
evaluation.write("result.json")
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import Scoring, SourceConfig, check_task, skills_lands, task_name
from loraloom.config.text import local_path
from loraloom.data.tasks import QuestionSet, load_question_set
from loraloom.errors import ConfigError
from loraloom.eval.cache import ScoreCache, describe_adapters, describe_evaluation
from loraloom.eval.generated_answers import AnswerSet, load_answer_set, score_answers
from loraloom.eval.held_out import HeldOutSet, load_held_out, score_rows
from loraloom.eval.results import SCHEMA_VERSION, Comparison, Evaluation, Fields
from loraloom.eval.routing import RoutingTally
from loraloom.eval.score import Scorer, Scores, score_choices
from loraloom.eval.statistics import Pair, check_scored, choose_pairs, holm, seed_means
from loraloom.host.host import Host

TaskSet = QuestionSet | AnswerSet


def evaluate(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Path | TaskSet | Sequence[str | Path | TaskSet],
    adapters: Sequence[str | None] | None = None,
    *,
    scoring: Scoring | None = None,
    split: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    pairs: Sequence[Pair] | None = None,
    max_tokens_per_batch: int | None = None,
    cache: ScoreCache | None = None,
    console: Console | None = None,
    sources: Mapping[str, str] | None = None,
    command: str = "",
    compat: Literal["moe-peft"] | None = None,
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
        pairs: Pairs of adapters to compare, `base` for the base model. Default: each adapter with
            the base model, and all pairs of up to four.
        max_tokens_per_batch: Number of tokens scored at once, with padding and all adapters.
            Default: 1,024 on a CPU, 16,384 elsewhere.
        cache: Cache of scores to read and extend. Default: compute every score.
        console: Console for a progress bar. Default: show none.
        sources: Paths of adapters by name, recorded with their files' hashes.
        command: Command line, recorded in the results.
        compat: `moe-peft` to score the last token of each label that MoE-PEFT knows for the task,
            as MoE-PEFT does.

    Returns:
        The results by adapter and task, and the comparisons.

    Raises:
        ConfigError: If a task is unknown, or options exclude each other.
        DataError: If a task's data is missing or damaged, or a question doesn't fit the model.
        AdapterError: If the host lacks an adapter, or its scores are not finite.
    """
    _check_limit(limit)
    chosen = _choose_adapters(host, adapters)
    scorer = Scorer(
        host,
        tokenizer,
        chosen,
        pairs=_check_pairs(chosen, pairs),
        max_tokens_per_batch=max_tokens_per_batch,
        cache=cache,
        console=console,
        files=describe_adapters(sources or {}),
        command=command,
        compat=compat,
    )
    listed = [tasks] if isinstance(tasks, str | Path | TaskSet) else tasks
    sets = [task for task in listed if isinstance(task, TaskSet)]
    names = [str(task) for task in listed if not isinstance(task, TaskSet)]
    sets += load_question_sets(names, scoring, split, data, limit)
    return score_sets(scorer, sets)


def evaluate_loss(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    data: SourceConfig | Mapping[str, Any] | Sequence[HeldOutSet] | Iterator[HeldOutSet],
    adapters: Sequence[str | None] | None = None,
    *,
    max_length: int | None = None,
    limit: int | None = None,
    pairs: Sequence[Pair] | None = None,
    max_tokens_per_batch: int | None = None,
    cache: ScoreCache | None = None,
    console: Console | None = None,
    sources: Mapping[str, str] | None = None,
    command: str = "",
) -> Evaluation:
    """Compute the loss of several adapters on held-out rows, all in one pass, and compare them.

    Args:
        host: Base model with the adapters.
        tokenizer: Tokenizer of the base model.
        data: Source as under `data:` in a run file, `{"dataset": ..., "format": ...}` or
            `{"task": ...}`, or results of `load_held_out`. Of preference pairs, the accuracy is
            the share whose chosen answer is more likely.
        adapters: Names of adapters; None is the base model. Default: the base model and all.
        max_length: Longest row in tokens; None for the default of training, or the model's
            maximum if that is less.
        limit: Maximum number of rows, from the beginning.
        pairs: Pairs of adapters to compare, `base` for the base model. Default: each adapter with
            the base model, and all pairs of up to four.
        max_tokens_per_batch: Number of tokens scored at once, with padding and all adapters.
            Default: 1,024 on a CPU, 16,384 elsewhere.
        cache: Cache of scores to read and extend. Default: compute every score.
        console: Console for a progress bar. Default: show none.
        sources: Paths of adapters by name, recorded with their files' hashes.
        command: Command line, recorded in the results.

    Returns:
        The results by adapter and data set, and the comparisons.

    Raises:
        ConfigError: If the data set's settings are wrong.
        DataError: If it is missing or damaged, or no row fits.
        AdapterError: If the host lacks an adapter, or its losses are not finite.
    """
    _check_limit(limit)
    chosen = _choose_adapters(host, adapters)
    scorer = Scorer(
        host,
        tokenizer,
        chosen,
        pairs=_check_pairs(chosen, pairs),
        max_tokens_per_batch=max_tokens_per_batch,
        cache=cache,
        console=console,
        files=describe_adapters(sources or {}),
        command=command,
    )
    if isinstance(data, SourceConfig | Mapping):
        data = [load_held_out(host, tokenizer, data, max_length, limit)]
    return score_sets(scorer, list(data))


def _check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, or None for all, got {limit}")


def _choose_adapters(host: Host, adapters: Sequence[str | None] | None) -> list[str | None]:
    """List the adapters to score; by default the base model and all adapters of the host."""
    if adapters is None:
        return [None, *host.adapters]
    return [adapters] if isinstance(adapters, str) else list(adapters)


def _check_pairs(adapters: Sequence[str | None], pairs: Sequence[Pair] | None) -> Sequence[Pair]:
    """Choose the pairs to compare unless they are named, and check that both are scored."""
    if pairs is None:
        pairs = choose_pairs(adapters)
    check_scored(adapters, pairs)
    return pairs


def score_sets(scorer: Scorer, sets: Sequence[TaskSet] | Sequence[HeldOutSet]) -> Evaluation:
    if not sets:
        raise ConfigError("an evaluation needs at least one task or data set, got none")
    names = [data.name if isinstance(data, HeldOutSet) else data.task for data in sets]
    if len(set(names)) < len(names):
        raise ConfigError(f"data sets must have different names, got {', '.join(names)}")
    if scorer.cache is not None:
        scorer.cache.begin()
    tally = RoutingTally(scorer.host, scorer.adapters, scorer.tokenizer)
    scores = []
    for data in sets:
        if isinstance(data, HeldOutSet):
            scores.append(score_rows(data, scorer, tally))
            continue
        if scorer.compat and (isinstance(data, AnswerSet) or data.scoring != "label"):
            raise ConfigError(f"compat {scorer.compat} requires choice tasks with scoring: label")
        if isinstance(data, AnswerSet):
            scores.append(score_answers(data, scorer))
        else:
            scores.append(score_choices(data, scorer, tally))
    return summarise(
        scores,
        scorer.pairs,
        **describe_evaluation(scorer.host, scorer.files, scorer.command),
        tasks={task.name: dict(task.details) for task in scores},
        num_cached_scores=0 if scorer.cache is None else scorer.cache.num_found,
        routing=tally.summarise(),
        compat=scorer.compat,
    )


def summarise(scores: Sequence[Scores], pairs: Sequence[Pair], **details: Any) -> Evaluation:
    results: dict[str, dict[str, Fields]] = {}
    figures: dict[str, dict[str, Any]] = {}
    for task in scores:
        figures[task.name] = {}
        for adapter, result in task.results.items():
            results.setdefault(adapter, {})[task.name] = result
            figures[task.name][adapter] = result.get("loss", result.get("accuracy"))
    sides = [(task, *pair) for task in scores for pair in pairs]
    differences = [task.compare(first, second) for task, first, second in sides]
    # Holm's adjustment is over all tasks: whoever looks for the significant one looks at all
    adjusted = holm([difference.p_value for difference in differences])
    comparisons = []
    for (task, first, second), difference, p_value in zip(
        sides, differences, adjusted, strict=True
    ):
        comparison = Comparison(
            **vars(difference),
            task=task.name,
            metric=task.metric,
            first=first,
            second=second,
            adjusted_p_value=p_value,
        )
        comparisons.append(comparison)
    return Evaluation(
        schema_version=SCHEMA_VERSION,
        results=results,
        seeds=seed_means(figures),
        comparisons=comparisons,
        scores=list(scores),
        **details,
    )


def load_question_sets(
    tasks: Sequence[str],
    scoring: Scoring | None = None,
    split: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
) -> list[TaskSet]:
    loaded = {task: load_answer_set(task, split, limit) for task in tasks}
    answer_sets = {task: answers for task, answers in loaded.items() if answers is not None}
    without_split = [name for name, x in answer_sets.items() if x.details.get("split") is None]
    if split and without_split:
        raise ConfigError(
            f"files of {', '.join(without_split)} have no splits. Remove split={split}, or score "
            "other tasks separately."
        )
    if answer_sets and (scoring or data):
        raise ConfigError(f"scoring and data are for choice tasks, got {', '.join(answer_sets)}")
    names = [task_name(check_task(task)) for task in tasks if task not in answer_sets]
    reading = [name for name in names if not skills_lands(name)]  # others are generated
    if data is not None and len(reading) > 1:  # they must not all read the data of a single one
        missing = [name for name in reading if not (local_path(data, "data") / name).is_dir()]
        if missing:
            raise ConfigError(
                f"data must be a directory with a subdirectory per task, got {data} without "
                f"{', '.join(missing)}"
            )
    sets: list[TaskSet] = []
    for task in tasks:
        path = None if reading and skills_lands(task) else data
        answers = answer_sets.get(task)
        sets.append(answers or load_question_set(task, scoring, split, path, limit))
    return sets
