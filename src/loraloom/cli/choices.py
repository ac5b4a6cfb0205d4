"""`loraloom eval --task`: choice questions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from loraloom.cli.scoring import open_cache, present, score_parts, tell_kept
from loraloom.config.data import Scoring
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from loraloom.cli.eval import EvalRun
    from loraloom.data.questions import QuestionSet
    from loraloom.eval.evaluation import Compat, Evaluation


def score_choices(
    run: EvalRun,
    tasks: Sequence[str],
    *,
    scoring: Scoring | None,
    split: str | None,
    compat: Compat | None,
    compare: Sequence[str],
) -> None:
    """Score choice tasks, write the results and print them; options are those of the verb."""
    from loraloom.eval.comparison import choose_pairs
    from loraloom.eval.evaluation import load_question_sets
    from loraloom.eval.joining import join_evaluations
    from loraloom.eval.results import write_questions
    from loraloom.terminal import make_console

    if not tasks:
        raise ConfigError(
            "--task must name at least one task, got none; or give --dataset or --harness"
        )
    pairs = choose_pairs(run.names, compare)
    run.check()
    asked = load_question_sets(tasks, scoring, split, run.data, run.limit, compat)
    messages = make_console(stderr=True, soft_wrap=True)
    parts = score_parts(run, partial(_score, asked, compat), messages)
    evaluation = join_evaluations(parts, run.names, pairs)
    present(run, evaluation, messages)
    if run.per_question is not None:
        write_questions(run.per_question, evaluation.tasks)


def _score(
    asked: Sequence[QuestionSet],
    compat: Compat | None,
    run: EvalRun,
    messages: Console,
) -> Evaluation:
    from loraloom.eval.evaluation import evaluate
    from loraloom.eval.progress import EvaluationProgress

    host, tokenizer = run.load()
    kept = open_cache(run, host, messages)
    with tell_kept(kept, messages), EvaluationProgress(messages) as progress:
        return evaluate(
            host,
            tokenizer,
            asked,
            run.names,
            compat=compat,
            pairs=(),
            cache=kept,
            max_tokens_per_batch=run.batch_tokens,
            progress=progress,
            sources=run.adapters,
            command=run.command,
        )
