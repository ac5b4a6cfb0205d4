"""The choice tasks of `loraloom eval`: scores are kept, results are written down and shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.config.data import Scoring
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from loraloom.cli.eval import EvalRun
    from loraloom.eval.cache import ScoreCache
    from loraloom.eval.evaluation import Compat
    from loraloom.models.host import Host


def score_choices(
    run: EvalRun,
    tasks: Sequence[str],
    *,
    scoring: Scoring | None,
    split: str | None,
    compat: Compat | None,
    compare: Sequence[str],
    cache: Path | None,
    no_cache: bool,
) -> None:
    """Score choice tasks, write the results and print them; options are those of the verb.

    Raises:
        ConfigError: If there is no task, scores can't be kept, or a file can't be written.
        DataError, AdapterError: As in `loraloom.eval.evaluation.evaluate`.
        KeyboardInterrupt: After Ctrl-C, when the user has been told what is kept.
    """
    from rich.console import Console

    from loraloom.eval.comparison import choose_pairs
    from loraloom.eval.evaluation import evaluate, load_question_sets
    from loraloom.eval.progress import EvaluationProgress
    from loraloom.eval.results import write_questions

    if not tasks:
        raise ConfigError("--task must name at least one task, got none; or give --harness")
    pairs = choose_pairs(run.names, compare)
    run.check()
    asked = load_question_sets(tasks, scoring, split, run.data, run.limit, compat)
    host, tokenizer = run.load()
    messages = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
    kept = None if no_cache else _open_cache(run, host, cache, messages)
    with _tell_kept(kept, messages), EvaluationProgress(messages) as progress:
        evaluation = evaluate(
            host,
            tokenizer,
            asked,
            run.names,
            compat=compat,
            pairs=pairs,
            cache=kept,
            max_tokens_per_batch=run.batch_tokens,
            progress=progress,
            sources=run.adapters,
            command=run.command,
        )
    if run.per_question is not None:
        write_questions(run.per_question, evaluation.tasks)
    for name, routing in evaluation.details["routing"].items():
        for warning in routing["warnings"]:
            messages.print(f"warning: adapter {name}: {warning}")
    for path in run.outputs:
        evaluation.write(path)
    console = Console(markup=False, highlight=False)
    for number, table in enumerate(evaluation.tables()):
        console.print(*([""] if number else []), table, sep="\n")


def _open_cache(
    run: EvalRun, host: Host, directory: Path | None, messages: Console
) -> ScoreCache | None:
    """Open the cache; where the default directory can't be used, say so and go on without."""
    from loraloom.eval.cache import ScoreCache, default_cache_directory

    try:
        return ScoreCache(directory or default_cache_directory(), host, run.names)
    except ConfigError as error:
        if directory is not None:
            raise
        messages.print(f"warning: {error}")
        return None


@contextmanager
def _tell_kept(cache: ScoreCache | None, messages: Console) -> Iterator[None]:
    """Say what the cache had, and what it keeps of an evaluation that is interrupted."""
    try:
        yield
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
        messages.print(f"{cache.num_found} of {total} scores were kept in {cache.directory}")
