"""`loraloom eval`: how well the base model and its adapters answer questions, or predict rows."""

import logging
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field
from typing_extensions import override

from loraloom.atomic_io import cache_directory, prepare_output
from loraloom.cli.init import infer_source
from loraloom.cli.options import HostOptions, Section
from loraloom.config.data import DataFormat, PromptForm, Scoring, SourceConfig
from loraloom.config.fields import checked
from loraloom.config.text import parse_yaml
from loraloom.data.sources import find_location, read_rows
from loraloom.eval.cache import ScoreCache, describe_adapters, describe_evaluation
from loraloom.eval.evaluation import load_question_sets, score_sets
from loraloom.eval.held_out import load_held_out
from loraloom.eval.results import Evaluation, Fields, check_outputs, write_lines
from loraloom.eval.score import Scorer
from loraloom.eval.statistics import Pair, choose_pairs
from loraloom.formats.files import read_adapters
from loraloom.formats.layouts import StoredAdapter
from loraloom.generation.loading import load_host
from loraloom.terminal import make_console, print_tables

# Options that only some kinds of evaluation read.
_ONLY = {
    ("harness",): "harness_include num_fewshot apply_chat_template",
    ("dataset",): "format max_length",
    ("task",): "scoring data compat",
    ("task", "dataset"): "split compare no_cache",
}


class EvalRun(HostOptions):
    """What is evaluated on what, and where the results go."""

    task: Annotated[tuple[str, ...], Section.DATA] = ()
    """Score choice tasks or generated answers: names with commas, or YAML files. Repeatable."""
    dataset: Annotated[tuple[str, ...], Section.DATA] = ()
    """Compute the loss on held-out rows: a file, directory, Hub ID or {dataset: rows.jsonl, fields:
    {output: reply}}. Repeatable."""
    harness: Annotated[tuple[str, ...], Section.DATA] = ()
    """Score lm-evaluation-harness tasks: names with commas. Repeatable."""
    harness_include: Annotated[Path | None, Section.DATA] = None
    """Add --harness tasks from this directory's YAML files, which can run code."""
    num_fewshot: Annotated[int | None, Section.DATA] = Field(default=None, ge=0)
    """Show N examples per --harness question. Default: the task's number."""
    apply_chat_template: Annotated[bool, Section.DATA] = False
    """Use adapters' prompt form, or else the chat template, for --harness."""
    format: Annotated[DataFormat | None, Section.DATA] = None
    """Read --dataset rows in this format. Default: the adapters' training format, or else the
    first that fits the columns."""
    max_length: Annotated[int | None, Section.DATA] = Field(default=None, ge=2)
    """Truncate --dataset rows to N tokens. Default: 512."""
    data: Annotated[Path | None, Section.DATA] = None
    """Read task data from this directory. Default: the Hub."""
    split: Annotated[str | None, Section.DATA] = None
    """Score this split. Default: test or validation, as the task says."""
    scoring: Annotated[Scoring | None, Section.DATA] = None
    """Score the choice's label or its text. Default: label, or the task file's."""
    compat: Annotated[Literal["moe-peft"] | None, Section.DATA] = None
    """Score labels as MoE-PEFT does."""
    limit: Annotated[int | None, Section.DATA] = Field(default=None, ge=1)
    """Score only the first N questions or rows."""
    no_base: Annotated[bool, Section.RESULTS] = False
    """Skip the base model without adapters."""
    batch_tokens: Annotated[int | None, Section.DATA] = Field(default=None, ge=1)
    """Score N tokens at once. Default: 1024 on a CPU, otherwise 16384."""
    compare: Annotated[tuple[str, ...], Section.RESULTS] = ()
    """Compare FIRST:SECOND: adapters, base, or NAME for the seeds NAME@0, NAME@1, ... Repeatable.
    Default: each with base, and all pairs of up to four."""
    no_cache: Annotated[bool, Section.RESULTS] = False
    """Neither read nor store cached scores."""
    output: Annotated[list[Path], Section.RESULTS] = Field(default_factory=list)
    """Write the results to FILE.json or FILE.csv. Repeatable."""
    per_question: Annotated[Path | None, Section.RESULTS] = None
    """Write one line per question to FILE.jsonl."""

    @override
    def contradictions(self) -> Iterator[str]:
        kinds = [kind for kind in ("task", "dataset", "harness") if getattr(self, kind)]
        if len(kinds) > 1:
            yield f"--{kinds[0]} and --{kinds[1]} exclude each other; pass only one option"
            return
        kind = kinds[0] if kinds else "task"
        for readers, names in _ONLY.items():
            if kind not in readers:
                allowed = " or ".join(f"--{reader}" for reader in readers)
                yield from self.misused(names.split(), f"requires {allowed}")
        if kind != "dataset" and not _names(getattr(self, kind)):
            yield f"--{kind} must name at least one task, got none"
        if self.no_base and not self.adapter:
            yield "--no-base requires --adapter NAME=PATH"

    @property
    def scored(self) -> list[str | None]:
        return [*self.names] if self.no_base else [None, *self.names]


def evaluate(*, run: Annotated[EvalRun, Parameter(name="*"), Section.MODEL]) -> None:
    """Score the base model and adapters on choice tasks, answers or held-out rows, in one pass.

    Scores of --task and --dataset are cached: after Ctrl-C, repeat the command to resume.
    """
    check_outputs(run.output)
    for path in run.output:
        prepare_output(path, "--output")
    prepare_output(run.per_question, "--per-question")
    pairs = choose_pairs(run.scored, run.compare)
    files = describe_adapters(run.adapters)
    stored = read_adapters(run.adapters)
    if run.harness:
        evaluation = _evaluate_harness(run, stored, files)
    else:
        evaluation = _evaluate_sets(run, stored, files, pairs)
    _print_notes(evaluation, describes_rows=bool(run.dataset))
    for path in run.output:
        evaluation.write(path)
    if run.per_question is not None:
        write_lines(run.per_question, evaluation.lines())
    print_tables(make_console(), evaluation.tables())  # last: its reader may be gone


def _print_notes(evaluation: Evaluation, *, describes_rows: bool) -> None:
    console = make_console(stderr=True, soft_wrap=True)
    if describes_rows:
        for name, details in evaluation.tasks.items():
            kind = "pairs" if details["format"] == "preference" else "rows"
            size = f"{details['num_examples']} {kind}, {details['num_tokens']} tokens with a loss"
            console.print("; ".join([f"{name}: {size}", *details["notes"]]))
    if evaluation.num_cached_scores:
        count = evaluation.num_cached_scores
        console.print(f"reused {count} cached scores of an earlier evaluation")
    for name, routing in evaluation.routing.items():
        for warning in routing.get("warnings", ()):
            console.print(f"warning: adapter {name}: {warning}")


def _evaluate_sets(
    run: EvalRun,
    stored: Mapping[str, StoredAdapter],
    files: Mapping[str, Fields],
    pairs: Sequence[Pair],
) -> Evaluation:
    sources = _held_out_sources(run, [adapter.prompt for adapter in stored.values()])
    sets: Any = load_question_sets(_names(run.task), run.scoring, run.split, run.data, run.limit)
    host, tokenizer = load_host(run, stored)
    for source in sources:
        sets.append(load_held_out(host, tokenizer, source, run.max_length, run.limit))
    scorer = Scorer(
        host,
        tokenizer,
        run.scored,
        max_tokens_per_batch=run.batch_tokens,
        cache=None if run.no_cache else ScoreCache(cache_directory() / "eval", host),
        console=make_console(stderr=True, soft_wrap=True),
        pairs=pairs,
        files=files,
        command=_command(),
        compat=run.compat,
    )
    return score_sets(scorer, sets)


def _evaluate_harness(
    run: EvalRun, stored: Mapping[str, StoredAdapter], files: Mapping[str, Fields]
) -> Evaluation:
    from loraloom.eval.harness import evaluate_adapters, load_tasks
    from loraloom.eval.harness.tasks import as_evaluation

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of settings that are given
    tasks = load_tasks(_names(run.harness), run.harness_include)
    host, tokenizer = load_host(run, stored)
    results = evaluate_adapters(
        host,
        tokenizer,
        tasks,
        run.scored,
        limit=run.limit,
        num_fewshot=run.num_fewshot,
        apply_chat_template=run.apply_chat_template,
        max_tokens_per_batch=run.batch_tokens,
    )
    return as_evaluation(results, **describe_evaluation(host, files, _command()))


def _command() -> str:
    return shlex.join(["loraloom", *sys.argv[1:]])


def _names(values: Sequence[str]) -> list[str]:
    # --task a,b --task c names three, each once
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(filter(None, names)))


def _held_out_sources(run: EvalRun, forms: Sequence[PromptForm | None]) -> list[SourceConfig]:
    """Check --dataset, in the prompt form in which all adapters were trained if it fits."""
    options = run.model_dump(include={"format", "split"}, exclude_none=True)
    form = forms[0] if len(set(forms)) == 1 else None
    sources = []
    for text in dict.fromkeys(run.dataset):
        settings = {**options, "dataset": text}
        if text.startswith("{"):
            settings = {**options, **parse_yaml(text, "--dataset")}
        if form is not None and _fits_form(settings, form):
            settings = form.model_dump(exclude={"system"}, exclude_none=True) | settings
        if isinstance(settings.get("dataset"), str) and "format" not in settings:
            settings = infer_source(settings, settings.get("split") or "validation")
            row_format = settings["format"]
            if settings["template"] is not None:
                row_format += f" {settings['template']}"
            note = f"note: reading {settings['dataset']} as {row_format}; --format overrides"
            print(note, file=sys.stderr)
        source = checked(SourceConfig, settings)
        if source.dataset is not None:  # what is broken is an error before the model is loaded
            split = source.split or "validation"
            read_rows(find_location(source.dataset, split, source.config), split, run.limit)
        sources.append(source)
    return sources


def _fits_form(settings: Mapping[str, Any], form: PromptForm) -> bool:
    if form.format == "task" or "task" in settings:
        return False
    pairs_format = "preference" if form.format == "chat" else form.format
    return settings.get("format") in (None, form.format, pairs_format)
