"""The options of `loraloom eval`, and what they have to do with one another."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from loraloom.cli.options import HostOptions, LocalPath, LocalPaths, RayOptions, Text
from loraloom.config.data import DataFormat, Scoring
from loraloom.durable import prepare_output
from loraloom.errors import ConfigError
from loraloom.eval.evaluation import Compat
from loraloom.eval.tables import check_outputs
from loraloom.generation.loading import check_sources, load_host
from loraloom.models.host import Host

_EFFECTS = {
    "harness_include": ("--harness",),
    "num_fewshot": ("--harness",),
    "apply_chat_template": ("--harness",),
    "format": ("--dataset",),
    "template": ("--dataset",),
    "chat_template": ("--dataset",),
    "field": ("--dataset",),
    "on_empty": ("--dataset",),
    "beta": ("--dataset",),
    "max_length": ("--dataset",),
    "data": ("--task", "--harness"),
    "scoring": ("--task",),
    "compat": ("--task",),
    "split": ("--task", "--dataset"),
    "compare": ("--task", "--dataset"),
    "cache": ("--task", "--dataset"),
    "no_cache": ("--task", "--dataset"),
    "ray": ("--task", "--dataset"),
}
"""Options that only some kinds of evaluation read."""


class EvalRun(HostOptions, RayOptions):
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
    compat: Compat | None = None
    """Score labels as MoE-PEFT does: its lists, last tokens."""
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

    @property
    def names(self) -> list[str | None]:
        """Names of the adapters to score; None is the base model."""
        return [*([] if self.no_base else [None]), *self.adapters]

    @property
    def command(self) -> str:
        """What the user typed."""
        return shlex.join(["loraloom", *sys.argv[1:]])

    @property
    def kind(self) -> str:
        """The option that says what is evaluated; --task where none is given."""
        options = {"--task": self.task, "--dataset": self.dataset, "--harness": self.harness}
        given = [option for option, value in options.items() if value]
        if len(given) > 1:
            raise ConfigError(f"{given[0]} has no effect with {given[1]}; give one of them")
        return given[0] if given else "--task"

    def check_options(self) -> None:
        """Raise a ConfigError for options that don't go together."""
        if not self.names:
            raise ConfigError("--no-base leaves nothing to score without --adapter; give one")
        if self.cache is not None and self.no_cache:
            raise ConfigError("--cache and --no-cache exclude each other; give one")
        for name, kinds in _EFFECTS.items():
            value = getattr(self, name)
            is_given = value is not None and value is not False and value != ()
            if is_given and self.kind not in kinds:
                raise ConfigError(
                    f"--{name.replace('_', '-')} has an effect with {' or '.join(kinds)} only; "
                    "leave it out"
                )
        check_outputs(self.output, self.per_question)

    def check(self) -> None:
        """Find what can be found wrong before anything is loaded, and make room for the outputs."""
        # the workers of a cluster have devices that this machine may not have
        model = (
            self
            if self.ray is None
            else self.model_copy(update={"device": "cpu", "dtype": "auto", "quantization": None})
        )
        check_sources(model, self.adapters)
        for path in self.output:
            prepare_output(path, "--output")
        prepare_output(self.per_question, "--per-question")

    def only(self, names: Sequence[str | None]) -> EvalRun:
        """Return the same with fewer adapters."""
        adapters = [f"{name}={path}" for name, path in self.adapters.items() if name in names]
        return self.model_copy(update={"adapter": tuple(adapters), "no_base": None not in names})

    def load(self) -> tuple[Host, PreTrainedTokenizerBase]:
        """Load the base model, its tokenizer and the adapters."""
        return load_host(self, self.adapters)
