"""`loraloom eval`: how well the base model and its adapters answer questions, or predict rows."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field
from rich.console import Console
from rich.table import Table
from typing_extensions import override

from loraloom.cli.options import HostOptions, LocalPath, LocalPaths, Text
from loraloom.config.data import DataFormat, Scoring, SourceConfig
from loraloom.data.sources import find_location, read_rows
from loraloom.data.tasks import QuestionSet
from loraloom.durable import cache_directory, prepare_output
from loraloom.errors import ConfigError
from loraloom.eval import evaluation, held_out
from loraloom.eval.cache import ScoreCache
from loraloom.eval.results import Evaluation, check_outputs, write_lines
from loraloom.eval.statistics import choose_pairs
from loraloom.formats.files import read_stored
from loraloom.formats.hub import find_adapter
from loraloom.generation.loading import check_sources, load_host
from loraloom.terminal import make_console, print_tables

# Options that only some kinds of evaluation read.
_ONLY = {
    ("--harness",): "harness_include num_fewshot apply_chat_template",
    ("--dataset",): "format template chat_template field on_empty beta max_length",
    ("--task",): "scoring",
    ("--task", "--harness"): "data",
    ("--task", "--dataset"): "split compare cache no_cache",
}


class EvalRun(HostOptions):
    """What is evaluated on what, and where the results go."""

    task: tuple[str, ...] = ()
    """Choice tasks to score: names with commas, or YAML files of your own. May be repeated."""
    dataset: tuple[str, ...] = ()
    """A held-out file, directory or hub id, whose loss is computed in place of --task. May be
    repeated."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness to score in place of --task, names with commas. May be
    repeated."""
    harness_include: LocalPath | None = None
    """A directory with YAML files of more tasks for --harness. They can run code: trust them
    first."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """Show N examples before each question, in place of the harness task's own number."""
    apply_chat_template: bool = False
    """With --harness: ask as the adapter's training data wrote prompts, or else in the tokenizer's
    chat template."""
    format: DataFormat | None = None
    """What the rows of --dataset are; by default what the adapters were trained on."""
    template: Text | None = None
    """Prompt template of --dataset with --format instruction; by default alpaca."""
    chat_template: Text | None = None
    """Chat template of --dataset: a file, a Jinja text, or trl for its training one."""
    field: tuple[str, ...] = ()
    """Column of a part of a row of --dataset, ROLE=COLUMN, as in `fields` of a run file. May be
    repeated."""
    on_empty: Literal["error", "skip"] | None = None
    """skip: leave out rows of --dataset with an empty answer."""
    beta: float | None = Field(default=None, ge=1e-6)
    """DPO's beta for --format preference; by default 0.1."""
    max_length: int | None = Field(default=None, ge=2)
    """Cut rows of --dataset to N tokens; by default 512, as in training."""
    data: LocalPath | None = None
    """A directory of data sets, or of the task's own; the hub's copy by default."""
    split: str | None = None
    """Split to score; by default test for ARC and OpenBookQA, validation for the rest."""
    scoring: Scoring | None = None
    """Score the choice's label or its own text; by default label, or a task file's own."""
    limit: int | None = Field(default=None, ge=1)
    """Score the first N questions only."""
    no_base: bool = False
    """Leave out the base model without an adapter."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a batch; by default 1024 on a CPU, else 16384."""
    compare: tuple[str, ...] = ()
    """Compare FIRST:SECOND on the same questions: adapters, base, or NAME for the seeds NAME@0,
    NAME@1, ... May be repeated. By default all are compared with base, and all pairs of up to
    four."""
    cache: LocalPath | None = None
    """Keep scores in this directory, so that an interrupted evaluation goes on; by default
    ~/.cache/loraloom/eval."""
    no_cache: bool = False
    """Keep no scores, and use none that are kept."""
    output: LocalPaths = Field(default_factory=list)
    """Write the results to FILE.json, FILE.csv or FILE.md. May be repeated."""
    per_question: LocalPath | None = None
    """Write a line for each question to FILE.jsonl."""

    @override
    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        kinds = {"--task": self.task, "--dataset": self.dataset, "--harness": self.harness}
        kind, *others = [option for option, value in kinds.items() if value] or ["--task"]
        if others:
            yield f"{kind} has no effect with {others[0]}; give one of them"
            return
        for allowed, names in _ONLY.items():
            for name in names.split():
                value = getattr(self, name)
                if kind not in allowed and value is not False and value not in (None, ()):
                    yield (
                        f"--{name.replace('_', '-')} has an effect with {' or '.join(allowed)} "
                        "only; leave it out"
                    )
        if kind != "--dataset" and not _names(kinds[kind]):
            yield f"{kind} must name at least one task, got none"
        if self.no_base and not self.adapter:
            yield "--no-base leaves nothing to score without --adapter; give one"
        if self.cache is not None and self.no_cache:
            yield "--cache and --no-cache exclude each other; give one"

    @property
    def names(self) -> list[str | None]:
        """Names of the adapters to score; None is the base model."""
        return [*([] if self.no_base else [None]), *self.adapters]


def evaluate(*, run: Annotated[EvalRun, Parameter(name="*")]) -> None:
    """Score choice questions, or held-out rows, with the base model and adapters, all in one pass.

    Scores of --task and --dataset are kept: after Ctrl-C the same command goes on where it was.
    """
    check_outputs(run.output, run.per_question)
    if run.harness:
        _evaluate_harness(run)
        return
    choose_pairs(run.names, run.compare)
    asked: Sequence[QuestionSet] | Sequence[SourceConfig]
    if run.dataset:
        asked = _held_out(run)
        _check(run)
        for source in asked:  # what is broken is told before the model is loaded
            split = source.split or "validation"
            read_rows(find_location(str(source.dataset), split, source.config), split)
    else:
        _check(run)
        tasks = _names(run.task)
        asked = evaluation.load_question_sets(tasks, run.scoring, run.split, run.data, run.limit)
    messages = make_console(stderr=True, soft_wrap=True)
    found = _score(asked, run, messages)
    for name, routing in found.routing.items():
        for warning in routing.get("warnings", ()):
            messages.print(f"warning: adapter {name}: {warning}")
    _write(run, found, found.tables(), found.lines())


def _write(
    run: EvalRun, found: Evaluation, tables: list[Table], lines: Iterator[Mapping[str, Any]]
) -> None:
    print_tables(make_console(), tables)
    for path in run.output:
        found.write(path)
    if run.per_question is not None:
        write_lines(run.per_question, lines)


def _names(values: Sequence[str]) -> list[str]:
    # --task a,b --task c names three, each once
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(filter(None, names)))


def _command() -> str:
    return shlex.join(["loraloom", *sys.argv[1:]])


def _check(run: EvalRun) -> None:
    """Find what can be found wrong before anything is loaded, and make room for the outputs."""
    check_sources(run, run.adapters)
    for path in run.output:
        prepare_output(path, "--output")
    prepare_output(run.per_question, "--per-question")


def _held_out(run: EvalRun) -> list[SourceConfig]:
    # without --format, rows are written as those that all adapters were trained on
    settings = {"format", "template", "chat_template", "split", "on_empty"}
    given = run.model_dump(include=settings, exclude_none=True)
    fields = [text.partition("=") for text in run.field]
    for text, (role, _, column) in zip(run.field, fields, strict=True):
        if not role or not column:
            raise ConfigError(f"--field must be ROLE=COLUMN, got {text!r}")
        given.setdefault("fields", {})[role] = column
    forms = [read_stored(find_adapter(path)).prompt for path in run.adapters.values()]
    form = forms[0] if forms and all(one == forms[0] for one in forms) else None
    if run.format is None and form is not None and form.format in ("instruction", "chat", "text"):
        known = {"format", "template", "chat_template"}
        given = form.model_dump(include=known, exclude_none=True) | given
    if run.beta is not None and run.format != "preference":
        raise ConfigError("--beta has an effect with --format preference only; leave it out")
    datasets = list(dict.fromkeys(run.dataset))
    names = [held_out.data_set_name(dataset) for dataset in datasets]
    if len(set(names)) < len(names):
        raise ConfigError(f"--dataset must give different names, got {', '.join(names)}")
    return [held_out.parse_source({"dataset": dataset, **given}) for dataset in datasets]


def _score(asked: Sequence[Any], run: EvalRun, messages: Console) -> Evaluation:
    """Load the model and score all adapters, with scores that are kept."""
    host, tokenizer = load_host(run, run.adapters)
    cache: ScoreCache | None = None
    try:
        if not run.no_cache:
            cache = ScoreCache(run.cache or cache_directory() / "eval", host, run.names)
    except ConfigError as error:
        if run.cache is not None:
            raise
        messages.print(f"warning: {error}")
    options: dict[str, Any] = {
        "pairs": choose_pairs(run.names, run.compare),
        "cache": cache,
        "max_tokens_per_batch": run.batch_tokens,
        "console": messages,
        "sources": run.adapters,
        "command": _command(),
    }
    try:
        if run.dataset:
            sizes = run.max_length, run.limit, run.beta or held_out.BETA
            asked = [held_out.load_held_out(host, tokenizer, one, *sizes) for one in asked]
            for one in asked:
                messages.print(held_out.describe_rows(one.name, one.details))
            found = evaluation.evaluate_loss(host, tokenizer, asked, run.names, **options)
        else:
            found = evaluation.evaluate(host, tokenizer, asked, run.names, **options)
    except KeyboardInterrupt:
        kept = "no scores are kept"
        if cache is not None:
            count = cache.num_found + cache.num_added
            kept = (
                f"{count} scores are kept in {cache.directory}, the same command goes on from there"
            )
        messages.print(f"stopped; {kept}")
        raise
    if cache is not None and cache.num_found:
        messages.print(
            f"{cache.num_found} of {cache.num_found + cache.num_added} answers were scored before; "
            f"their scores are kept in {cache.directory}"
        )
    return found


def _evaluate_harness(run: EvalRun) -> None:
    """Score tasks of lm-eval, print a table and write files."""
    for path in run.output:
        if path.suffix.lower() != ".json":
            raise ConfigError(f"--output must end in .json with --harness, got {path}")
    _check(run)
    from loraloom.eval.cache import describe_evaluation
    from loraloom.eval.harness import evaluate_adapters, load_tasks
    from loraloom.eval.harness.results import as_evaluation, question_lines, results_table
    from loraloom.eval.harness.tasks import check_asks_text

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of settings that are given
    loaded = load_tasks(_names(run.harness), run.harness_include, run.data)
    check_asks_text(loaded)
    host, tokenizer = load_host(run, run.adapters)
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
    found = as_evaluation(results, **describe_evaluation(host, run.adapters, _command()))
    _write(run, found, [results_table(found)], question_lines(results))
