"""`loraloom eval`: how well the base model and its adapters answer questions, or predict rows."""

import logging
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter
from pydantic import Field
from typing_extensions import override

from loraloom.atomic_io import cache_directory, prepare_output
from loraloom.cli.init import first_rows, infer_source
from loraloom.cli.options import HostOptions, Section
from loraloom.config.data import DataFormat, Scoring, SourceConfig
from loraloom.config.fields import checked
from loraloom.config.text import parse_yaml
from loraloom.data.sources import find_location, read_rows
from loraloom.eval import evaluation, held_out
from loraloom.eval.cache import ScoreCache, describe_adapters, describe_evaluation
from loraloom.eval.results import Evaluation, check_outputs, write_lines
from loraloom.eval.statistics import choose_pairs
from loraloom.formats.files import read_stored
from loraloom.formats.raw_files import find_adapter
from loraloom.generation.loading import check_sources, load_host
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
        given = [kind for kind in ("task", "dataset", "harness") if getattr(self, kind)]
        kind, *others = given or ["task"]
        if others:
            yield f"--{kind} and --{others[0]} exclude each other; pass only one option"
            return
        for kinds, names in _ONLY.items():
            unread = self.model_fields_set & {*names.split()} if kind not in kinds else ()
            for name in sorted(unread):  # the same message each time
                allowed = " or ".join(f"--{one}" for one in kinds)
                yield f"--{name.replace('_', '-')} requires {allowed}"
        if kind != "dataset" and not _names(getattr(self, kind)):
            yield f"--{kind} must name at least one task, got none"
        if self.no_base and not self.adapter:
            yield "--no-base requires --adapter NAME=PATH"

    @property
    def names(self) -> list[str | None]:
        """Names of the adapters to score; None is the base model."""
        return [*([] if self.no_base else [None]), *self.adapters, *self.derived]


def evaluate(*, run: Annotated[EvalRun, Parameter(name="*"), Section.MODEL]) -> None:
    """Score the base model and adapters on choice tasks, answers or held-out rows, in one pass.

    Scores of --task and --dataset are cached: after Ctrl-C, repeat the command to resume.
    """
    check_outputs(run.output)
    for path in run.output:
        prepare_output(path, "--output")
    prepare_output(run.per_question, "--per-question")
    choose_pairs(run.names, run.compare)
    check_sources(run, run.adapters)
    messages = make_console(stderr=True, soft_wrap=True)
    if run.harness:
        found, lines = _evaluate_harness(run)
    else:
        found = _score(run)
        lines = found.lines()
    for name, details in found.tasks.items() if run.dataset else ():
        messages.print(held_out.describe_rows(name, details))
    if found.num_cached_scores:
        messages.print(f"reused {found.num_cached_scores} cached scores of an earlier evaluation")
    for name, routing in found.routing.items():
        for warning in routing.get("warnings", ()):
            messages.print(f"warning: adapter {name}: {warning}")
    for path in run.output:
        found.write(path)
    if run.per_question is not None:
        write_lines(run.per_question, lines)
    print_tables(make_console(), found.tables())  # last: its reader may be gone


def _names(values: Sequence[str]) -> list[str]:
    # --task a,b --task c names three, each once
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(filter(None, names)))


def _held_out(run: EvalRun) -> list[SourceConfig]:
    asked = run.model_dump(include={"format", "split"}, exclude_none=True)
    # rows are written as those that all adapters were trained on, if their format allows it
    forms = [read_stored(find_adapter(path)).prompt for path in run.adapters.values()]
    form = forms[0] if forms and all(one == forms[0] for one in forms) else None
    kind = form.format if form else "task"
    alike = (None, kind, "preference" if kind == "chat" else kind)
    sources = []
    for text in dict.fromkeys(run.dataset):
        own = parse_yaml(text, "--dataset") if text.startswith("{") else {"dataset": text}
        given = {**asked, **own}
        if form and kind != "task" and "task" not in own and given.get("format") in alike:
            given = form.model_dump(exclude={"system"}, exclude_none=True) | given
        if isinstance(given.get("dataset"), str) and "format" not in given:
            split = given.get("split") or "validation"
            location = find_location(given["dataset"], split, given.get("config"))
            given = infer_source(given, first_rows(location, split))
            read = " ".join(filter(None, (given["format"], given["template"])))
            print(
                f"note: reading {given['dataset']} as {read}; --format overrides", file=sys.stderr
            )
        source = checked(SourceConfig, given)
        split = source.split or "validation"
        if source.dataset is not None:  # what is broken is an error before the model is loaded
            read_rows(find_location(source.dataset, split, source.config), split, run.limit)
        sources.append(source)
    return sources


def _score(run: EvalRun) -> Evaluation:
    """Score all adapters on tasks or held-out rows, with scores that are kept."""
    tasks, data = _names(run.task), _held_out(run) if run.dataset else []
    asked = evaluation.load_question_sets(tasks, run.scoring, run.split, run.data, run.limit)
    host, tokenizer = load_host(run, run.adapters)
    options: dict[str, Any] = {
        "pairs": choose_pairs(run.names, run.compare),
        "cache": None if run.no_cache else ScoreCache(cache_directory() / "eval", host),
        "max_tokens_per_batch": run.batch_tokens,
        "console": make_console(stderr=True, soft_wrap=True),
        "sources": run.adapters,
        "command": _command(),
    }
    if asked:
        options["compat"] = run.compat
        return evaluation.evaluate(host, tokenizer, asked, run.names, **options)
    sets = (held_out.load_held_out(host, tokenizer, x, run.max_length, run.limit) for x in data)
    return evaluation.evaluate_loss(host, tokenizer, sets, run.names, **options)


def _command() -> str:
    return shlex.join(["loraloom", *sys.argv[1:]])


def _evaluate_harness(run: EvalRun) -> tuple[Evaluation, Iterable[Mapping[str, Any]]]:
    from loraloom.eval.harness import evaluate_adapters, load_tasks
    from loraloom.eval.harness.tasks import as_evaluation, check_asks_text, question_lines

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of settings that are given
    loaded = load_tasks(_names(run.harness), run.harness_include)
    check_asks_text(loaded)
    host, tokenizer = load_host(run, run.adapters)
    adapters = describe_adapters(run.adapters)
    options = run.model_dump(include={"limit", "num_fewshot", "apply_chat_template"})
    options["max_tokens_per_batch"] = run.batch_tokens
    results = evaluate_adapters(host, tokenizer, loaded, run.names, **options)
    found = as_evaluation(results, **describe_evaluation(host, adapters, _command()))
    return found, question_lines(results)
