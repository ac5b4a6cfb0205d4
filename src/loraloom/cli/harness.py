"""`loraloom eval --harness`: tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from loraloom.cli.eval import EvalRun


def score_harness(
    run: EvalRun,
    tasks: Sequence[str],
    *,
    include: Path | None,
    num_fewshot: int | None,
    apply_chat_template: bool,
) -> None:
    """Score tasks of lm-eval, print a table and write files; options are those of the verb."""
    if not tasks:
        raise ConfigError("--harness must name at least one task, got none")
    for path in run.outputs:
        if path.suffix.lower() != ".json":
            raise ConfigError(f"--output must end in .json with --harness, got {path}")
    run.check()
    from loraloom.durable import write_output
    from loraloom.eval.harness import evaluate_adapters, load_tasks
    from loraloom.eval.harness.results import (
        plain_results,
        question_lines,
        results_table,
        summarise,
    )
    from loraloom.eval.harness.tasks import check_asks_text
    from loraloom.eval.provenance import describe_evaluation
    from loraloom.eval.results import SCHEMA_VERSION
    from loraloom.terminal import make_console, print_tables

    with _errors_only():
        loaded = load_tasks(tasks, include, run.data)
        check_asks_text(loaded)
        host, tokenizer = run.load()
        results = evaluate_adapters(
            host,
            tokenizer,
            loaded,
            run.names,
            lm_options={"max_tokens_per_batch": run.batch_tokens},
            limit=run.limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
        )
    print_tables(make_console(), [results_table(results)])
    if run.per_question is not None:
        write_output(run.per_question, "".join(f"{line}\n" for line in question_lines(results)))
    value = {
        "schema_version": SCHEMA_VERSION,
        "results": summarise(results),
        **describe_evaluation(host, run.adapters, (), run.command),
        "lm_eval": plain_results(results),
    }
    for path in run.outputs:
        write_output(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
