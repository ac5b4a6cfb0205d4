"""`loraloom eval`: how well the base model and its adapters answer choice questions."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
    from loraloom.data.questions import QuestionSet

Compat = Literal["moe-peft"]


def evaluate(
    base_model: BaseModelOption,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="TASK[,TASK]",
            help="Choice tasks to score, by name or the .yaml file of one's own. May be repeated.",
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
        Scoring | None,
        typer.Option(
            "--scoring",
            help="Score the choice's label or its own text; label, or a task file's own default.",
        ),
    ] = None,
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
    compare: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            metavar="FIRST:SECOND",
            help="Compare these two on the same questions: adapters, base, or NAME for the seeds "
            "NAME@0, NAME@1, ... May be repeated. By default everybody against base, and all "
            "pairs of up to four.",
        ),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Where scores are kept, so that an evaluation goes on where it was interrupted; "
            "~/.cache/loraloom/eval by default.",
        ),
    ] = None,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Keep no scores, and take none that are kept.")
    ] = False,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Write the results there: FILE.json, FILE.csv or FILE.md. May be repeated.",
        ),
    ] = None,
    per_question: Annotated[
        Path | None,
        typer.Option("--per-question", metavar="FILE.jsonl", help="Write a line a question there."),
    ] = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "auto",
    attn_implementation: AttnOption = None,
) -> None:
    """Score choice questions with the base model and with adapters, all in one pass.

    Scores are kept: after Ctrl-C the same command goes on where it was.
    """
    adapters, outputs = parse_adapters(adapter), output or []
    names = [*([] if no_base else [None]), *adapters]
    if not names:
        raise ConfigError("--no-base leaves nothing to score without --adapter; give one")
    if cache is not None and no_cache:
        raise ConfigError("--cache and --no-cache exclude each other; give one")
    from loraloom.durable import prepare_output
    from loraloom.eval.tables import check_outputs
    from loraloom.infer.loading import check_sources, load_host

    command = shlex.join(["loraloom", *sys.argv[1:]])
    check_outputs(outputs, per_question)
    load = lambda: load_host(base_model, adapters, dtype, device, attn_implementation)  # noqa: E731
    only_harness = {
        "--harness-include": harness_include,
        "--num-fewshot": num_fewshot,
        "--apply-chat-template": apply_chat_template,
    }
    if harness is not None:
        only_task = {
            "--task": task,
            "--split": split,
            "--scoring": scoring,
            "--compat": compat,
            "--compare": compare,
            "--cache": cache,
            "--no-cache": no_cache,
        }
        harness_run = HarnessRun(
            tasks=_split_names(harness),
            names=names,
            adapters=adapters,
            include=harness_include,
            data=data,
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
            batch_tokens=batch_tokens,
            outputs=outputs,
            per_question=per_question,
            command=command,
        )
        check_harness(harness_run, only_task)
        run = lambda: run_harness(harness_run, load)  # noqa: E731
        check_sources(base_model, adapters, device)
    else:
        check_no_harness(only_harness)
        from loraloom.cli.choices import ChoiceRun, score_choices
        from loraloom.eval.comparison import choose_pairs

        tasks = _split_names(task or [])
        _check_options(tasks, scoring, compat)
        pairs = choose_pairs(names, compare or ())
        check_sources(base_model, adapters, device)
        choice_run = ChoiceRun(
            asked=_load(tasks, scoring, compat, split, data, limit),
            names=names,
            adapters=adapters,
            pairs=pairs,
            compat=compat,
            batch_tokens=batch_tokens,
            cache=cache,
            no_cache=no_cache,
            outputs=outputs,
            per_question=per_question,
            command=command,
        )
        run = lambda: score_choices(choice_run, *load())  # noqa: E731
    for path in outputs:
        prepare_output(path, "--output")
    prepare_output(per_question, "--per-question")
    run()


def _split_names(values: Sequence[str]) -> list[str]:
    """Names of `--task a,b --task c`, each once."""
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(filter(None, names)))


def _check_options(tasks: Sequence[str], scoring: Scoring | None, compat: Compat | None) -> None:
    from loraloom.data.tasks import find_task
    from loraloom.eval.moe_peft import check_tasks

    if not tasks:
        raise ConfigError("--task must name at least one task, got none; or give --harness")
    names = [find_task(task).name for task in tasks]
    if len(set(names)) < len(names):
        raise ConfigError(f"--task must name tasks that differ, got {', '.join(names)}")
    if compat is not None and scoring == "text":
        raise ConfigError(f"--compat {compat} scores labels; leave out --scoring {scoring}")
    if compat is not None:
        check_tasks(tasks)


def _check_data(tasks: Sequence[str], data: Path | None) -> None:
    """Check that several tasks don't read the data of one."""
    from loraloom.data.tasks import find_task

    if data is None or len(tasks) == 1:
        return
    absent = [
        name for name in (find_task(task).name for task in tasks) if not (data / name).is_dir()
    ]
    if absent:
        raise ConfigError(
            f"--data must be a directory with one for each of several tasks, got {data} without "
            f"{', '.join(absent)}"
        )


def _load(
    tasks: Sequence[str],
    scoring: Scoring | None,
    compat: Compat | None,
    split: str | None,
    data: Path | None,
    limit: int | None,
) -> list[QuestionSet]:
    from loraloom.data.questions import load_question_set
    from loraloom.eval.moe_peft import with_all_labels

    _check_data(tasks, data)
    asked = [load_question_set(task, scoring, split, data, limit) for task in tasks]
    if compat is None:
        return asked
    return [replace(one, questions=[*map(with_all_labels, one.questions)]) for one in asked]
