"""`loraloom eval --harness`: tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraloom.models.host import Host


@dataclass(frozen=True)
class HarnessRun:
    """What to evaluate.

    Args:
        tasks: Names of tasks, groups and tags, or patterns.
        names: Adapters to score; None is the base model.
        adapters: Directory or hub id of each adapter by name.
        include: Directory of more tasks.
        data: Directory of local data sets.
        limit: Most questions of a task.
        num_fewshot: Examples before each question; None leaves it to the tasks.
        apply_chat_template: Ask in the tokenizer's chat template.
        batch_tokens: Tokens of a batch.
        outputs: JSON files to write.
        per_question: JSON lines file to write.
        command: What started it.
    """

    tasks: Sequence[str]
    names: Sequence[str | None]
    adapters: Mapping[str, str]
    include: Path | None
    data: Path | None
    limit: int | None
    num_fewshot: int | None
    apply_chat_template: bool
    batch_tokens: int | None
    outputs: Sequence[Path]
    per_question: Path | None
    command: str


def check_harness(run: HarnessRun, others: Mapping[str, Any]) -> None:
    """Check what `loraloom eval --harness` is given.

    Args:
        run: What to evaluate.
        others: Options that concern `--task` alone, with what they are given, if anything.

    Raises:
        ConfigError: If there is no task, an option has no effect, or lm-eval is not installed.
    """
    if not run.tasks:
        raise ConfigError("--harness must name at least one task, got none")
    for option, value in others.items():
        if value:
            raise ConfigError(f"{option} has no effect with --harness, got {value}; leave it out")
    for path in run.outputs:
        if path.suffix.lower() != ".json":
            raise ConfigError(f"--output must end in .json with --harness, got {path}")
    from loraloom.eval.harness.installed import check_installed

    check_installed()


def check_no_harness(options: Mapping[str, Any]) -> None:
    """Raise a ConfigError if an option that concerns `--harness` alone is given without it."""
    for option, value in options.items():
        if value is not None and value is not False:
            raise ConfigError(f"{option} has an effect with --harness only; leave it out")


def run_harness(
    run: HarnessRun,
    load: Callable[[], tuple[Host, PreTrainedTokenizerBase]],
) -> None:
    """Score tasks of lm-eval with adapters, all in one pass; print a table and write files.

    Args:
        run: What to evaluate.
        load: Loads the host and its tokenizer; called once the tasks and their data are there.
    """
    from rich.console import Console

    from loraloom.durable import write_output
    from loraloom.eval.harness import evaluate_adapters, load_tasks
    from loraloom.eval.harness.results import (
        plain_results,
        question_lines,
        results_table,
        summarise,
    )
    from loraloom.eval.provenance import describe_evaluation
    from loraloom.eval.results import SCHEMA_VERSION

    with _errors_only():
        loaded = load_tasks(run.tasks, run.include, run.data)
        host, tokenizer = load()
        results = evaluate_adapters(
            host,
            tokenizer,
            loaded,
            run.names,
            lm_options={"max_tokens_per_batch": run.batch_tokens},
            limit=run.limit,
            num_fewshot=run.num_fewshot,
            apply_chat_template=run.apply_chat_template,
            log_samples=run.per_question is not None,
        )
    if run.per_question is not None:
        write_output(run.per_question, "".join(f"{line}\n" for line in question_lines(results)))
    beside = describe_evaluation(host, run.adapters, (), run.command)
    value = {
        "schema_version": SCHEMA_VERSION,
        "results": summarise(results),
        **beside,
        "lm_eval": plain_results(results),
    }
    for path in run.outputs:
        write_output(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    Console(markup=False, highlight=False).print(results_table(results))


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
