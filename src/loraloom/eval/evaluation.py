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
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from loraloom.config.data import Scoring, SourceConfig
from loraloom.config.text import local_path
from loraloom.data.tasks import QuestionSet, find_task, load_question_set
from loraloom.data.tokens import NO_LOSS, TokenPair
from loraloom.errors import ConfigError, not_finite
from loraloom.eval.cache import LogLikelihoods, ScoreCache, describe_evaluation
from loraloom.eval.held_out import BETA, HeldOutSet, load_held_out, pair_scores, row_scores
from loraloom.eval.results import BASE, SCHEMA_VERSION, Comparison, Evaluation
from loraloom.eval.routing import RoutingTally
from loraloom.eval.score import (
    Advance,
    Scorer,
    Scores,
    encode_choices,
    encode_last_tokens,
    score_questions,
    task_scores,
    with_all_labels,
)
from loraloom.eval.statistics import Pair, check_scored, choose_pairs, holm, seed_means
from loraloom.generation.rows import example_row
from loraloom.models.host import Host

Compat = Literal["moe-peft"]


_PLAIN_INTERVAL_S = 10.0


class EvaluationProgress:
    """Shows what is done and the time left, on a terminal often, elsewhere now and then."""

    def __init__(self, console: Console):
        self._console, self._bars = console, ExitStack()

    def __enter__(self) -> EvaluationProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.close()

    def start(self, name: str, sizes: Sequence[int], unit: str = "questions") -> Advance:
        """Begin to show a task, whose items weigh by their size, as the largest come first."""
        console = self._console
        bar: Any = tqdm(
            total=sum(sizes),
            file=console.file,
            disable=console.quiet,
            leave=False,
            desc=f"{name}: 0/{len(sizes)} {unit}",
            delay=0 if console.is_terminal else _PLAIN_INTERVAL_S,
            mininterval=0.1 if console.is_terminal else _PLAIN_INTERVAL_S,
            bar_format="{desc} |{bar}| ETA {remaining}",
        )
        self._bars.callback(bar.close)
        num_done = 0

        def advance(places: Sequence[int]) -> None:
            nonlocal num_done
            num_done += len(places)
            line = f"{name}: {num_done}/{len(sizes)} {unit}"
            bar.set_description_str(line, refresh=False)
            bar.update(sum(sizes[place] for place in places))

        return advance


def summarise(scores: Sequence[Scores], pairs: Sequence[Pair], **details: Any) -> Evaluation:
    """Compute figures, means over seeds and comparisons of all that was scored."""
    results: dict[str, dict[str, Any]] = {}
    for task in scores:
        for name, result in task.results.items():
            results.setdefault(name, {})[task.name] = result
    figure = lambda one: one.get("loss", one.get("accuracy"))  # noqa: E731
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


def join_evaluations(
    parts: Sequence[Evaluation], names: Sequence[str | None], pairs: Sequence[Pair]
) -> Evaluation:
    """Make one of several, as if all adapters had been scored together."""
    order = [name or BASE for name in names]

    def joined(of_parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        found = {name: value for part in of_parts for name, value in part.items()}
        return {name: found[name] for name in order if name in found}

    def join(of: Sequence[Scores]) -> Scores:
        lines = partial(chain.from_iterable, [[*one.lines()] for one in of])
        results, values = joined(one.results for one in of), joined(one.values for one in of)
        return replace(of[0], results=results, values=values, lines=lines)

    computed = {"schema_version", "results", "seeds", "comparisons", "scores"}
    details = {name: value for name, value in parts[0] if name not in computed}
    details["routing"] = joined(part.routing for part in parts)
    details["adapters"] = joined(part.adapters for part in parts)
    details["num_cached_scores"] = sum(part.num_cached_scores for part in parts)
    return summarise([*map(join, zip(*(p.scores for p in parts), strict=True))], pairs, **details)


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
        self._tokenizer, self._progress = tokenizer, progress
        self._scorer = Scorer(host, self.names, max_tokens_per_batch, cache)
        self._how = (host, sources or {}, command)
        self._tally = RoutingTally(host, self.names, tokenizer)

    def ask(self, asked: QuestionSet, compat: Compat | None) -> Scores:
        questions = asked.questions
        # characters that the model reads: different contexts once, and every continuation
        sizes = [sum(map(len, {*one.contexts, *one.continuations})) for one in questions]
        scores = score_questions(
            self._scorer,
            self._tokenizer,
            questions,
            encode_choices if compat is None else encode_last_tokens,
            on_progress=self._progress and self._progress.start(asked.task, sizes),
            on_routing=self._tally.of(asked.task, len(questions), [one.group for one in questions]),
        )
        places = [f"in {asked.task}, question {question.index}" for question in questions]
        values = {name: [one.log_likelihoods for one in of] for name, of in scores.items()}
        _check_finite("scores", values, places)
        return task_scores(asked, {name or BASE: of_name for name, of_name in scores.items()})

    def measure(self, data: HeldOutSet) -> Scores:
        scorer, progress = self._scorer, self._progress
        if data.has_pairs and None not in self.names:  # rewards are relative to the base model
            scorer = replace(scorer, adapters=[None, *self.names])
        scores = scorer.score(
            [[example_row(one) for one in examples] for examples in data.rows],
            # no question has NO_LOSS in a context, so none is taken for a row
            [[TokenPair([NO_LOSS, *x.input_ids], list(x.labels)) for x in of] for of in data.rows],
            progress and progress.start(data.name, data.num_tokens, "rows"),
            self._tally.of(data.name, len(data.rows)),
        )
        places = [f"in row {place + 1} of {data.name}" for place in data.places]
        _check_finite("losses", scores, places)
        losses = {name: [-value for (value,) in of_name] for name, of_name in scores.items()}
        asked = {name or BASE: losses[name] for name in self.names}
        return pair_scores(data, asked, losses[None]) if data.has_pairs else row_scores(data, asked)

    def evaluation(self, scores: Sequence[Scores], **more: Any) -> Evaluation:
        """Note how the scores of all data sets were got."""
        details = describe_evaluation(*self._how) | more
        details["tasks"] = {task.name: dict(task.details) for task in scores}
        details["routing"] = self._tally.summarise()
        cache = self._scorer.cache
        details["num_cached_scores"] = 0 if cache is None else cache.num_found
        return summarise(scores, self.pairs, **details)


def _check_finite(
    what: str, scores: Mapping[str | None, Sequence[LogLikelihoods]], places: Sequence[str]
) -> None:
    for name, of_name in scores.items():
        for values, place in zip(of_name, places, strict=True):
            if not all(map(math.isfinite, values)):
                shown = values[0] if len(values) == 1 else values
                raise not_finite(what, shown, [name], place)


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
    if isinstance(data, SourceConfig | Mapping):
        data = [load_held_out(host, tokenizer, data, max_length, limit, beta)]
    if not data:
        raise ConfigError("data must have a data set at least, got none")
    return scored.evaluation([scored.measure(one) for one in data])


def load_question_sets(
    tasks: Sequence[str],
    scoring: Scoring | None = None,
    split: str | None = None,
    data: str | Path | None = None,
    limit: int | None = None,
    compat: Compat | None = None,
) -> list[QuestionSet]:
    names = [find_task(task).name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"tasks must have different names, got {', '.join(names)}")
    if compat is not None and scoring == "text":
        raise ConfigError(f"compat {compat} scores labels; leave out scoring {scoring}")
    if data is not None and len(tasks) > 1:  # which must not all read the data of one
        places = {name: local_path(data, "data") / name for name in names}
        if absent := [name for name, place in places.items() if not place.is_dir()]:
            needed = f"data must be a directory with one for each of several tasks, got {data}"
            raise ConfigError(f"{needed} without {', '.join(absent)}")
    loaded = [load_question_set(task, scoring, split, data, limit) for task in tasks]
    if compat is None:
        return loaded
    return [replace(task, questions=[*map(with_all_labels, task.questions)]) for task in loaded]
