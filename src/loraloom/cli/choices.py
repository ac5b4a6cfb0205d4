"""`loraloom eval --task`: choice questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.cli.scoring import open_cache, present, tell_kept
from loraloom.config.data import Scoring
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from loraloom.cli.eval import EvalRun
    from loraloom.eval.evaluation import Compat


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
    from loraloom.eval.comparison import choose_pairs
    from loraloom.eval.evaluation import evaluate, load_question_sets
    from loraloom.eval.progress import EvaluationProgress
    from loraloom.eval.results import write_questions
    from loraloom.terminal import make_console

    if not tasks:
        raise ConfigError(
            "--task must name at least one task, got none; or give --dataset or --harness"
        )
    pairs = choose_pairs(run.names, compare)
    run.check()
    asked = load_question_sets(tasks, scoring, split, run.data, run.limit, compat)
    host, tokenizer = run.load()
    messages = make_console(stderr=True, soft_wrap=True)
    kept = None if no_cache else open_cache(run, host, cache, messages)
    with tell_kept(kept, messages), EvaluationProgress(messages) as progress:
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
    present(run, evaluation, messages)
