"""`loraloom eval`: how well the base model and its adapters answer choice questions."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraloom.cli.harness import HarnessRun, check_harness, check_no_harness, run_harness
from loraloom.cli.options import (
    AdapterOption,
    AttnOption,
    BaseModelOption,
    DeviceOption,
    DtypeOption,
    parse_adapters,
)
from loraloom.config.data import Scoring
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from rich.progress import Progress
    from transformers import PreTrainedTokenizerBase

    from loraloom.data import ChoiceQuestion
    from loraloom.eval.results import TaskScores
    from loraloom.models.host import Host

Compat = Literal["moe-peft"]


def evaluate(
    base_model: BaseModelOption,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task", metavar="TASK[,TASK]", help="Choice tasks to score. May be repeated."
        ),
    ] = None,
    harness: Annotated[
        list[str] | None,
        typer.Option(
            "--harness",
            metavar="TASK[,TASK]",
            help="Tasks of lm-evaluation-harness in place of --task. May be repeated.",
        ),
    ] = None,
    harness_include: Annotated[
        Path | None,
        typer.Option(
            "--harness-include", metavar="DIR", help="YAML files of more tasks for --harness."
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", min=0, help="Examples before a question of --harness; as tasks say."
        ),
    ] = None,
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template", help="Ask tasks of --harness in the model's chat template."
        ),
    ] = False,
    adapter: AdapterOption = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="A directory of data sets, or of the task's own; the hub's copy by default.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split", help="test for ARC and OpenBookQA, validation for the rest, by default."
        ),
    ] = None,
    scoring: Annotated[
        Scoring, typer.Option("--scoring", help="Score the choice's label or its own text.")
    ] = "label",
    compat: Annotated[
        Compat | None,
        typer.Option("--compat", help="Score labels as MoE-PEFT does: its lists, last tokens."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Score the first so many questions only.")
    ] = None,
    no_base: Annotated[
        bool, typer.Option("--no-base", help="Leave out the base model without an adapter.")
    ] = False,
    batch_tokens: Annotated[
        int | None,
        typer.Option("--batch-tokens", min=1, help="Tokens of a batch; 1024 on a CPU, else 16384."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE.json", help="Write the results there.")
    ] = None,
    per_question: Annotated[
        Path | None,
        typer.Option("--per-question", metavar="FILE.jsonl", help="Write a line a question there."),
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    attn_implementation: AttnOption = None,
) -> None:
    """Score choice questions with the base model and with adapters, all in one pass."""
    adapters = parse_adapters(adapter)
    names = [*([] if no_base else [None]), *adapters]
    if not names:
        raise ConfigError("--no-base leaves nothing to score without --adapter; give one")
    from loraloom.durable import prepare_output
    from loraloom.infer.loading import check_sources, load_host

    only_harness = {
        "--harness-include": harness_include,
        "--num-fewshot": num_fewshot,
        "--apply-chat-template": apply_chat_template,
    }
    if harness is not None:
        run = HarnessRun(
            tasks=_split_names(harness),
            adapters=names,
            include=harness_include,
            data=data,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            batch_tokens=batch_tokens,
            output=output,
            per_question=per_question,
        )
        other_scoring = None if scoring == "label" else scoring
        only_task = {"--task": task, "--split": split, "--compat": compat}
        check_harness(run.tasks, {**only_task, "--scoring": other_scoring})
        check_sources(base_model, adapters, device)
        prepare_output(output, "--output")
        prepare_output(per_question, "--per-question")
        run_harness(
            run,
            lambda: load_host(base_model, adapters, dtype, device, attn_implementation),
            lambda host: _provenance(host, adapters, {"dtype": dtype}),
        )
        return
    check_no_harness(only_harness)
    tasks = _split_names(task or [])
    _check_options(tasks, scoring, compat)
    from rich.console import Console

    from loraloom.eval.results import write_questions, write_results

    check_sources(base_model, adapters, device)
    questions = {name: _load(name, scoring, compat, split, data, limit) for name in tasks}
    prepare_output(output, "--output")
    prepare_output(per_question, "--per-question")
    host, tokenizer = load_host(base_model, adapters, dtype, device, attn_implementation)
    scored = _score(host, tokenizer, questions, split, names, batch_tokens, compat)
    if per_question is not None:
        write_questions(per_question, scored)
    if output is not None:
        settings = {"scoring": scoring, "compat": compat, "dtype": dtype}
        write_results(output, scored, _provenance(host, adapters, settings))
    _print_tables(Console(markup=False, highlight=False), scored)


def _split_names(values: Sequence[str]) -> list[str]:
    """Names of `--task a,b --task c`, each once."""
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(filter(None, names)))


def _check_options(tasks: Sequence[str], scoring: Scoring, compat: Compat | None) -> None:
    from loraloom.data import find_task
    from loraloom.eval.moe_peft import check_tasks

    if not tasks:
        raise ConfigError("--task must name at least one task, got none; or give --harness")
    for name in tasks:
        find_task(name)
    if compat is not None and scoring != "label":
        raise ConfigError(f"--compat {compat} scores labels; leave out --scoring {scoring}")
    if compat is not None:
        check_tasks(tasks)


def _load(
    task: str,
    scoring: Scoring,
    compat: Compat | None,
    split: str | None,
    data: Path | None,
    limit: int | None,
) -> list[ChoiceQuestion]:
    from loraloom.data import load_questions
    from loraloom.eval.moe_peft import with_all_labels

    questions = load_questions(task, scoring, split, data, limit)
    return questions if compat is None else [with_all_labels(question) for question in questions]


def _score(
    host: Host,
    tokenizer: PreTrainedTokenizerBase,
    questions: Mapping[str, list[ChoiceQuestion]],
    split: str | None,
    adapters: Sequence[str | None],
    batch_tokens: int | None,
    compat: Compat | None,
) -> list[TaskScores]:
    from loraloom.data import find_task
    from loraloom.eval.encoding import encode_choices
    from loraloom.eval.moe_peft import encode_last_tokens
    from loraloom.eval.protocol import score_questions
    from loraloom.eval.results import TaskScores, check_finite

    encode = encode_choices if compat is None else encode_last_tokens
    scored = []
    with _progress() as progress:
        for name, asked in questions.items():
            bar = progress.add_task(name, total=len(asked))
            scores = score_questions(
                host,
                tokenizer,
                asked,
                adapters,
                batch_tokens,
                lambda done, _, bar=bar: progress.update(bar, completed=done),
                encode,
            )
            scored.append(TaskScores(name, split or find_task(name).evaluation_split, scores))
            check_finite(scored[-1])
    return scored


@contextmanager
def _progress() -> Iterator[Progress]:
    """Show bars on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress


def _provenance(
    host: Host, adapters: Mapping[str, str], settings: Mapping[str, Any]
) -> dict[str, Any]:
    from loraloom.eval.results import versions

    return {
        "base_model": host.base.name_or_path,
        "base_fingerprint": host.base.fingerprint,
        "adapters": dict(adapters),
        **settings,
        "versions": versions(),
        "command": shlex.join(["loraloom", *sys.argv[1:]]),
    }


def _print_tables(console: Any, scored: Sequence[TaskScores]) -> None:
    from loraloom.eval.results import group_table, results_table

    console.print(results_table(scored))
    for task in scored:
        table = group_table(task)
        if table is not None:
            console.print()
            console.print(table)
