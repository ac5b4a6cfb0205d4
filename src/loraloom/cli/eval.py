"""`loraloom eval`: how well the base model and its adapters answer questions, or predict rows."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from loraloom.cli.options import (
    AdapterOption,
    AttnOption,
    BaseModelOption,
    ChatTemplateOption,
    DeviceOption,
    DtypeOption,
    QuantizationOption,
    RayOption,
    RayWorkersOption,
    check_ray_workers,
    parse_adapters,
    path_option,
)
from loraloom.config.data import DataFormat, Scoring
from loraloom.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraloom.config.quantization import AnyQuantization
    from loraloom.models.host import Host

Compat = Literal["moe-peft"]


@dataclass(frozen=True)
class EvalRun:
    """What every evaluation is given, whatever it scores.

    `names` are the adapters to score, None the base model; `adapters` says where each is loaded
    from. The rest is as on the command line.
    """

    base_model: str
    dtype: str
    device: str
    attn_implementation: str | None
    quantization: AnyQuantization | None
    names: Sequence[str | None]
    adapters: Mapping[str, str]
    data: Path | None
    limit: int | None
    batch_tokens: int | None
    outputs: Sequence[Path]
    per_question: Path | None
    cache: Path | None
    no_cache: bool
    command: str
    ray: str | None
    ray_workers: int | None

    def check(self) -> None:
        """Find what can be found wrong before anything is loaded, and make room for the outputs."""
        from loraloom.durable import prepare_output
        from loraloom.infer.loading import check_sources

        if self.ray is None:
            where = (self.device, self.dtype, self.quantization)
            check_sources(self.base_model, self.adapters, *where)
        else:  # whose workers have devices that this machine may not have
            check_sources(self.base_model, self.adapters, "cpu")
        for path in self.outputs:
            prepare_output(path, "--output")
        prepare_output(self.per_question, "--per-question")

    def only(self, names: Sequence[str | None]) -> EvalRun:
        """Return the same with fewer adapters."""
        adapters = {name: path for name, path in self.adapters.items() if name in names}
        return replace(self, names=names, adapters=adapters)

    def load(self) -> tuple[Host, PreTrainedTokenizerBase]:
        """Load the base model, its tokenizer and the adapters."""
        from loraloom.infer.loading import load_host

        return load_host(
            self.base_model,
            self.adapters,
            self.dtype,
            self.device,
            self.attn_implementation,
            self.quantization,
        )


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
        path_option(
            "--harness-include",
            metavar="DIR",
            help="YAML files of more tasks for --harness; they can run code, so trust them first.",
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
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset",
            metavar="FILE",
            help="A held-out file, directory or hub id to compute the loss on in place of --task. "
            "May be repeated.",
        ),
    ] = None,
    data_format: Annotated[
        DataFormat | None,
        typer.Option(
            "--format",
            help="What the rows of --dataset are, as in a run file; by default what the "
            "adapters were trained on.",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Of --dataset with --format instruction; alpaca."),
    ] = None,
    chat_template: ChatTemplateOption = None,
    field: Annotated[
        list[str] | None,
        typer.Option(
            "--field",
            metavar="ROLE=COLUMN",
            help="The column of --dataset that is a role of its format, output=reply say. "
            "May be repeated.",
        ),
    ] = None,
    on_empty: Annotated[
        Literal["error", "skip"] | None,
        typer.Option("--on-empty", help="skip: leave out rows of --dataset with an empty answer."),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option("--beta", min=1e-6, help="DPO's beta for --format preference; 0.1."),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            "--max-length", min=2, help="Longest row of --dataset in tokens; 512, as in training."
        ),
    ] = None,
    adapter: AdapterOption = None,
    data: Annotated[
        Path | None,
        path_option(
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
        path_option(
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
        path_option(
            "--output",
            metavar="FILE",
            help="Write the results there: FILE.json, FILE.csv or FILE.md. May be repeated.",
        ),
    ] = None,
    per_question: Annotated[
        Path | None,
        path_option("--per-question", metavar="FILE.jsonl", help="Write a line a question there."),
    ] = None,
    ray: RayOption = None,
    ray_workers: RayWorkersOption = None,
    dtype: DtypeOption = "auto",
    quantization: QuantizationOption = None,
    device: DeviceOption = "auto",
    attn_implementation: AttnOption = None,
) -> None:
    """Score choice questions, or held-out rows, with the base model and adapters, all in one pass.

    Scores of --task and --dataset are kept: after Ctrl-C the same command goes on where it was.
    """
    adapters, outputs = parse_adapters(adapter), output or []
    names = [*([] if no_base else [None]), *adapters]
    if not names:
        raise ConfigError("--no-base leaves nothing to score without --adapter; give one")
    if cache is not None and no_cache:
        raise ConfigError("--cache and --no-cache exclude each other; give one")
    check_ray_workers(ray, ray_workers)
    from loraloom.eval.tables import check_outputs

    kind = _only_one({"--task": task, "--dataset": dataset, "--harness": harness})
    settings = {
        "format": data_format,
        "template": template,
        "chat_template": chat_template,
        "fields": _parse_fields(field),
        "on_empty": on_empty,
    }
    options: dict[str, tuple[Any, tuple[str, ...]]] = {
        "--harness-include": (harness_include, ("--harness",)),
        "--num-fewshot": (num_fewshot is not None, ("--harness",)),
        "--apply-chat-template": (apply_chat_template, ("--harness",)),
        "--format": (data_format, ("--dataset",)),
        "--template": (template, ("--dataset",)),
        "--chat-template": (chat_template, ("--dataset",)),
        "--field": (field, ("--dataset",)),
        "--on-empty": (on_empty, ("--dataset",)),
        "--beta": (beta is not None, ("--dataset",)),
        "--max-length": (max_length, ("--dataset",)),
        "--data": (data, ("--task", "--harness")),
        "--scoring": (scoring, ("--task",)),
        "--compat": (compat, ("--task",)),
        "--split": (split, ("--task", "--dataset")),
        "--compare": (compare, ("--task", "--dataset")),
        "--cache": (cache, ("--task", "--dataset")),
        "--no-cache": (no_cache, ("--task", "--dataset")),
        "--ray": (ray, ("--task", "--dataset")),
    }
    for option, (value, kinds) in options.items():
        if value and kind not in kinds:
            raise ConfigError(
                f"{option} has an effect with {' or '.join(kinds)} only; leave it out"
            )
    run = EvalRun(
        base_model=base_model,
        dtype=dtype,
        device=device,
        attn_implementation=attn_implementation,
        quantization=quantization,
        names=names,
        adapters=adapters,
        data=data,
        limit=limit,
        batch_tokens=batch_tokens,
        outputs=outputs,
        per_question=per_question,
        cache=cache,
        no_cache=no_cache,
        command=shlex.join(["loraloom", *sys.argv[1:]]),
        ray=ray,
        ray_workers=ray_workers,
    )
    check_outputs(run.outputs, run.per_question)
    if harness is not None:
        from loraloom.cli.scoring import score_harness

        score_harness(
            run,
            _split_names(harness),
            include=harness_include,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
        )
        return
    if dataset is not None:
        from loraloom.cli.scoring import score_held_out

        score_held_out(
            run,
            list(dict.fromkeys(dataset)),
            settings={**settings, "split": split},
            max_length=max_length,
            beta=beta,
            compare=compare or (),
        )
        return
    from loraloom.cli.scoring import score_choices

    score_choices(
        run,
        _split_names(task or []),
        scoring=scoring,
        split=split,
        compat=compat,
        compare=compare or (),
    )


def _split_names(values: Sequence[str]) -> list[str]:
    """Names of `--task a,b --task c`, each once."""
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(filter(None, names)))


def _only_one(options: Mapping[str, Sequence[str] | None]) -> str:
    """The one option that says what is evaluated; --task where none is given."""
    given = [option for option, value in options.items() if value is not None]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} has no effect with {given[1]}; give one of them")
    return given[0] if given else next(iter(options))


def _parse_fields(texts: Sequence[str] | None) -> dict[str, str]:
    """Columns of --field by their roles."""
    fields = {}
    for text in texts or ():
        role, _, column = text.partition("=")
        if not role or not column:
            raise ConfigError(f"--field must be ROLE=COLUMN, got {text!r}")
        fields[role] = column
    return fields
