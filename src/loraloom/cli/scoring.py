"""What `loraloom eval` does once its options are read: choices, held-out rows, lm-eval's tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from loraloom.errors import ConfigError
from loraloom.training.settings import DpoConfig

if TYPE_CHECKING:
    from rich.console import Console

    from loraloom.cli.eval_options import EvalRun
    from loraloom.config.data import SourceConfig
    from loraloom.data.tasks import QuestionSet
    from loraloom.eval.cache import ScoreCache
    from loraloom.eval.results import Evaluation
    from loraloom.models.host import Host

DEFAULT_BETA = DpoConfig.model_fields["beta"].default

Score = Callable[["EvalRun", "Console"], "Evaluation"]


def score_choices(run: EvalRun, tasks: Sequence[str]) -> None:
    """Score choice tasks, write the results and print them; options are those of the verb."""
    from loraloom.eval.evaluation import load_question_sets
    from loraloom.eval.statistics import choose_pairs

    if not tasks:
        raise ConfigError(
            "--task must name at least one task, got none; or give --dataset or --harness"
        )
    choose_pairs(run.names, run.compare)
    run.check()
    asked = load_question_sets(tasks, run.scoring, run.split, run.data, run.limit, run.compat)
    _evaluate(run, partial(_ask, asked))


def _ask(asked: Sequence[QuestionSet], run: EvalRun, messages: Console) -> Evaluation:
    from loraloom.eval.evaluation import evaluate

    host, tokenizer = run.load()
    with _options(run, host, messages) as options:
        return evaluate(host, tokenizer, asked, run.names, compat=run.compat, **options)


def score_held_out(run: EvalRun, datasets: Sequence[str]) -> None:
    """Compute losses on data sets, write the results and print them."""
    from loraloom.data.sources import find_location, read_rows
    from loraloom.eval.held_out import data_set_name, parse_source
    from loraloom.eval.statistics import choose_pairs

    settings = run.model_dump(
        include={"format", "template", "chat_template", "split", "on_empty"}, exclude_none=True
    )
    given = settings | ({"fields": _parse_fields(run.field)} if run.field else {})
    if "format" not in given:
        given = {**_trained_on(run.adapters), **given}
    sources = [parse_source({"dataset": dataset, **given}) for dataset in datasets]
    names = [data_set_name(dataset) for dataset in datasets]
    if len(set(names)) < len(names):
        raise ConfigError(f"--dataset must give different names, got {', '.join(names)}")
    if run.beta is not None and given.get("format") != "preference":
        raise ConfigError("--beta has an effect with --format preference only; leave it out")
    choose_pairs(run.names, run.compare)
    run.check()
    for source in sources:  # so that what is missing or broken is told before the model is loaded
        assert source.dataset is not None, "parse_source wants one"
        split = source.split or "validation"
        read_rows(find_location(source.dataset, split, source.config), split)
    _evaluate(run, partial(_measure, sources))


def _trained_on(adapters: Mapping[str, str]) -> dict[str, str]:
    """The format and templates that all adapters were trained on; nothing if they differ."""
    from loraloom.formats.files import read_stored
    from loraloom.formats.hub import find_adapter

    forms = [read_stored(find_adapter(path)).prompt for path in adapters.values()]
    form = forms[0] if forms and all(one == forms[0] for one in forms) else None
    if form is None or form.format not in ("instruction", "chat", "text"):
        return {}
    return form.model_dump(include={"format", "template", "chat_template"}, exclude_none=True)


def _measure(sources: Sequence[SourceConfig], run: EvalRun, messages: Console) -> Evaluation:
    from loraloom.eval.evaluation import evaluate_loss
    from loraloom.eval.held_out import describe_rows, load_held_out

    host, tokenizer = run.load()
    beta = run.beta or DEFAULT_BETA
    sets = [load_held_out(host, tokenizer, one, run.max_length, run.limit, beta) for one in sources]
    for one in sets:
        messages.print(describe_rows(one.name, one.details))
    with _options(run, host, messages) as options:
        return evaluate_loss(host, tokenizer, sets, run.names, **options)


def _evaluate(run: EvalRun, score: Score) -> None:
    """Score all adapters here or on a cluster's workers; print the tables and write the files."""
    from loraloom.eval.evaluation import join_evaluations
    from loraloom.eval.results import write_lines
    from loraloom.eval.statistics import choose_pairs
    from loraloom.terminal import make_console, print_tables

    messages = make_console(stderr=True, soft_wrap=True)
    if run.ray is None:
        evaluation = score(run, messages)
    else:
        parts, pairs = _spread(run, score, messages), choose_pairs(run.names, run.compare)
        evaluation = join_evaluations(parts, run.names, pairs)
    for name, routing in evaluation.routing.items():
        for warning in routing.get("warnings", ()):
            messages.print(f"warning: adapter {name}: {warning}")
    print_tables(make_console(), evaluation.tables())
    for path in run.output:
        evaluation.write(path)
    if run.per_question is not None:
        write_lines(run.per_question, evaluation.lines())


def _spread(run: EvalRun, score: Score, messages: Console) -> list[Evaluation]:
    from loraloom.eval.held_out import describe_rows
    from loraloom.training.ray_cluster import score_on_workers

    work = partial(_score_in_worker, run, score)
    assert run.ray is not None, "asked for"
    try:
        parts = score_on_workers(
            work, run.names, run.ray, run.ray_workers, run.device, messages.print
        )
    except KeyboardInterrupt:
        messages.print("stopped; the same command goes on from any scores that are kept")
        raise
    for name, details in parts[0].tasks.items():  # workers are silent
        if "num_examples" in details:
            messages.print(describe_rows(name, details))
    return parts


def _score_in_worker(run: EvalRun, score: Score, names: Sequence[str | None]) -> Evaluation:
    from loraloom.terminal import make_console

    return score(run.only(names), make_console(quiet=True))


@contextmanager
def _options(run: EvalRun, host: Host, messages: Console) -> Iterator[dict[str, Any]]:
    """Open the cache and a progress bar, and say what the cache had, or keeps after Ctrl-C."""
    from loraloom.eval.evaluation import EvaluationProgress
    from loraloom.eval.statistics import choose_pairs

    cache = _open_cache(run, host, messages)
    try:
        with EvaluationProgress(messages) as progress:
            yield {
                # of a cluster's workers, none has all adapters
                "pairs": choose_pairs(run.names, run.compare) if run.ray is None else (),
                "cache": cache,
                "max_tokens_per_batch": run.batch_tokens,
                "progress": progress,
                "sources": run.adapters,
                "command": run.command,
            }
    except KeyboardInterrupt:
        if cache is None:
            messages.print("stopped; no scores are kept")
        else:
            messages.print(
                f"stopped; {cache.num_found + cache.num_added} scores are kept in "
                f"{cache.directory}, the same command goes on from there"
            )
        raise
    if cache is not None and cache.fault is not None:
        messages.print(f"warning: some scores are not kept: {cache.fault}")
    if cache is not None and cache.num_found:
        total = cache.num_found + cache.num_added
        messages.print(
            f"{cache.num_found} of {total} answers were scored before; their scores are kept in "
            f"{cache.directory}"
        )


def _open_cache(run: EvalRun, host: Host, messages: Console) -> ScoreCache | None:
    """Open the cache; where the default directory can't be used, say so and go on without."""
    from loraloom.eval.cache import ScoreCache, default_cache_directory

    if run.no_cache:
        return None
    try:
        return ScoreCache(run.cache or default_cache_directory(), host, run.names)
    except ConfigError as error:
        if run.cache is not None:
            raise
        messages.print(f"warning: {error}")
        return None


def score_harness(run: EvalRun, tasks: Sequence[str]) -> None:
    """Score tasks of lm-eval, print a table and write files; options are those of the verb."""
    if not tasks:
        raise ConfigError("--harness must name at least one task, got none")
    for path in run.output:
        if path.suffix.lower() != ".json":
            raise ConfigError(f"--output must end in .json with --harness, got {path}")
    run.check()
    from loraloom.eval.cache import describe_evaluation
    from loraloom.eval.harness import evaluate_adapters, load_tasks
    from loraloom.eval.harness.results import as_evaluation, question_lines, results_table
    from loraloom.eval.harness.tasks import check_asks_text
    from loraloom.eval.results import write_lines
    from loraloom.terminal import make_console, print_tables

    with _errors_only():
        loaded = load_tasks(tasks, run.harness_include, run.data)
        check_asks_text(loaded)
        host, tokenizer = run.load()
        results = evaluate_adapters(
            host,
            tokenizer,
            loaded,
            run.names,
            lm_options={"max_tokens_per_batch": run.batch_tokens},
            limit=run.limit,
            num_fewshot=run.num_fewshot,
            apply_chat_template=run.apply_chat_template,
        )
    details = describe_evaluation(host, run.adapters, run.command)
    evaluation = as_evaluation(results, **details)
    print_tables(make_console(), [results_table(evaluation)])
    if run.per_question is not None:
        write_lines(run.per_question, question_lines(results))
    for path in run.output:
        evaluation.write(path)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Hold back what lm-eval warns of on every run, such as settings that the user gave."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _parse_fields(texts: Sequence[str]) -> dict[str, str]:
    """Columns of --field by their roles."""
    fields = {}
    for text in texts:
        role, _, column = text.partition("=")
        if not role or not column:
            raise ConfigError(f"--field must be ROLE=COLUMN, got {text!r}")
        fields[role] = column
    return fields
