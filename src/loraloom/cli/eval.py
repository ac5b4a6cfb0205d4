"""`loraloom eval`: how well the base model and its adapters answer questions, or predict rows."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
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

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> EvalRun:
        """Take them from the options of the verb, by name."""
        from loraloom.eval.tables import check_outputs

        adapters = parse_adapters(given["adapter"])
        names = [*([] if given["no_base"] else [None]), *adapters]
        if not names:
            raise ConfigError("--no-base leaves nothing to score without --adapter; give one")
        if given["cache"] is not None and given["no_cache"]:
            raise ConfigError("--cache and --no-cache exclude each other; give one")
        check_ray_workers(given["ray"], given["ray_workers"])
        outputs = given["output"] or []
        check_outputs(outputs, given["per_question"])
        command = shlex.join(["loraloom", *sys.argv[1:]])
        shared = {field.name: given[field.name] for field in fields(cls) if field.name in given}
        return cls(names=names, adapters=adapters, outputs=outputs, command=command, **shared)

    def check(self) -> None:
        """Find what can be found wrong before anything is loaded, and make room for the outputs."""
        from loraloom.durable import prepare_output
        from loraloom.generation.loading import check_sources

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
        from loraloom.generation.loading import load_host

        return load_host(
            self.base_model,
            self.adapters,
            self.dtype,
            self.device,
            self.attn_implementation,
            self.quantization,
        )


TaskOption = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="TASK[,TASK]",
        help="Choice tasks to score, by name or the .yaml file of one's own. May be repeated.",
    ),
]
HarnessOption = Annotated[
    list[str] | None,
    typer.Option(
        "--harness",
        metavar="TASK[,TASK]",
        help="Tasks of lm-evaluation-harness in place of --task. May be repeated.",
    ),
]
HarnessIncludeOption = Annotated[
    Path | None,
    path_option(
        "--harness-include",
        metavar="DIR",
        help="YAML files of more tasks for --harness; they can run code, so trust them first.",
    ),
]
NumFewshotOption = Annotated[
    int | None,
    typer.Option(
        "--num-fewshot", min=0, help="Examples before a question of --harness; as tasks say."
    ),
]
ApplyChatTemplateOption = Annotated[
    bool,
    typer.Option(
        "--apply-chat-template", help="Ask tasks of --harness in the model's chat template."
    ),
]
DatasetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="FILE",
        help="A held-out file, directory or hub id to compute the loss on in place of --task. "
        "May be repeated.",
    ),
]
DataFormatOption = Annotated[
    DataFormat | None,
    typer.Option(
        "--format",
        help="What the rows of --dataset are, as in a run file; by default what the "
        "adapters were trained on.",
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", help="Of --dataset with --format instruction; alpaca."),
]
FieldOption = Annotated[
    list[str] | None,
    typer.Option(
        "--field",
        metavar="ROLE=COLUMN",
        help="The column of --dataset that is a role of its format, output=reply say. "
        "May be repeated.",
    ),
]
OnEmptyOption = Annotated[
    Literal["error", "skip"] | None,
    typer.Option("--on-empty", help="skip: leave out rows of --dataset with an empty answer."),
]
BetaOption = Annotated[
    float | None,
    typer.Option("--beta", min=1e-6, help="DPO's beta for --format preference; 0.1."),
]
MaxLengthOption = Annotated[
    int | None,
    typer.Option(
        "--max-length", min=2, help="Longest row of --dataset in tokens; 512, as in training."
    ),
]
DataOption = Annotated[
    Path | None,
    path_option(
        "--data",
        metavar="DIR",
        help="A directory of data sets, or of the task's own; the hub's copy by default.",
    ),
]
SplitOption = Annotated[
    str | None,
    typer.Option(
        "--split", help="test for ARC and OpenBookQA, validation for the rest, by default."
    ),
]
ScoringOption = Annotated[
    Scoring | None,
    typer.Option(
        "--scoring",
        help="Score the choice's label or its own text; label, or a task file's own default.",
    ),
]
CompatOption = Annotated[
    Compat | None,
    typer.Option("--compat", help="Score labels as MoE-PEFT does: its lists, last tokens."),
]
LimitOption = Annotated[
    int | None, typer.Option("--limit", min=1, help="Score the first so many questions only.")
]
NoBaseOption = Annotated[
    bool, typer.Option("--no-base", help="Leave out the base model without an adapter.")
]
BatchTokensOption = Annotated[
    int | None,
    typer.Option("--batch-tokens", min=1, help="Tokens of a batch; 1024 on a CPU, else 16384."),
]
CompareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--compare",
        metavar="FIRST:SECOND",
        help="Compare these two on the same questions: adapters, base, or NAME for the seeds "
        "NAME@0, NAME@1, ... May be repeated. By default everybody against base, and all "
        "pairs of up to four.",
    ),
]
CacheOption = Annotated[
    Path | None,
    path_option(
        "--cache",
        metavar="DIR",
        help="Where scores are kept, so that an evaluation goes on where it was interrupted; "
        "~/.cache/loraloom/eval by default.",
    ),
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Keep no scores, and take none that are kept.")
]
OutputOption = Annotated[
    list[Path] | None,
    path_option(
        "--output",
        metavar="FILE",
        help="Write the results there: FILE.json, FILE.csv or FILE.md. May be repeated.",
    ),
]
PerQuestionOption = Annotated[
    Path | None,
    path_option("--per-question", metavar="FILE.jsonl", help="Write a line a question there."),
]


def evaluate(
    base_model: BaseModelOption,
    task: TaskOption = None,
    harness: HarnessOption = None,
    harness_include: HarnessIncludeOption = None,
    num_fewshot: NumFewshotOption = None,
    apply_chat_template: ApplyChatTemplateOption = False,
    dataset: DatasetOption = None,
    data_format: DataFormatOption = None,
    template: TemplateOption = None,
    chat_template: ChatTemplateOption = None,
    field: FieldOption = None,
    on_empty: OnEmptyOption = None,
    beta: BetaOption = None,
    max_length: MaxLengthOption = None,
    adapter: AdapterOption = None,
    data: DataOption = None,
    split: SplitOption = None,
    scoring: ScoringOption = None,
    compat: CompatOption = None,
    limit: LimitOption = None,
    no_base: NoBaseOption = False,
    batch_tokens: BatchTokensOption = None,
    compare: CompareOption = None,
    cache: CacheOption = None,
    no_cache: NoCacheOption = False,
    output: OutputOption = None,
    per_question: PerQuestionOption = None,
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
    given = dict(locals())
    run = EvalRun.of(given)
    kind = _check_effects(given)
    from loraloom.cli.scoring import score_choices, score_harness, score_held_out

    if kind == "harness":
        score_harness(
            run,
            _split_names(harness or ()),
            include=harness_include,
            num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template,
        )
    elif kind == "dataset":
        settings = {
            "format": data_format,
            "template": template,
            "chat_template": chat_template,
            "fields": _parse_fields(field),
            "on_empty": on_empty,
            "split": split,
        }
        score_held_out(
            run,
            list(dict.fromkeys(dataset or ())),
            settings=settings,
            max_length=max_length,
            beta=beta,
            compare=compare or (),
        )
    else:
        score_choices(
            run,
            _split_names(task or ()),
            scoring=scoring,
            split=split,
            compat=compat,
            compare=compare or (),
        )


_EFFECTS = {
    "harness_include": ("harness",),
    "num_fewshot": ("harness",),
    "apply_chat_template": ("harness",),
    "data_format": ("dataset",),
    "template": ("dataset",),
    "chat_template": ("dataset",),
    "field": ("dataset",),
    "on_empty": ("dataset",),
    "beta": ("dataset",),
    "max_length": ("dataset",),
    "data": ("task", "harness"),
    "scoring": ("task",),
    "compat": ("task",),
    "split": ("task", "dataset"),
    "compare": ("task", "dataset"),
    "cache": ("task", "dataset"),
    "no_cache": ("task", "dataset"),
    "ray": ("task", "dataset"),
}
"""Options that have an effect on some kinds of evaluation only."""


def _check_effects(given: Mapping[str, Any]) -> str:
    """Tell what is evaluated, task, dataset or harness, and check that all options concern it."""
    kinds = [kind for kind in ("task", "dataset", "harness") if given[kind] is not None]
    if len(kinds) > 1:
        raise ConfigError(f"--{kinds[0]} has no effect with --{kinds[1]}; give one of them")
    kind = kinds[0] if kinds else "task"
    for option, effective in _EFFECTS.items():
        is_given = given[option] not in (None, []) and given[option] is not False
        if is_given and kind not in effective:
            named = " or ".join(f"--{one}" for one in effective)
            option = option.removeprefix("data_").replace("_", "-")
            raise ConfigError(f"--{option} has an effect with {named} only; leave it out")
    return kind


def _split_names(values: Sequence[str]) -> list[str]:
    """Names of `--task a,b --task c`, each once."""
    names = [name.strip() for value in values for name in value.split(",")]
    return list(dict.fromkeys(filter(None, names)))


def _parse_fields(texts: Sequence[str] | None) -> dict[str, str]:
    """Columns of --field by their roles."""
    fields = {}
    for text in texts or ():
        role, _, column = text.partition("=")
        if not role or not column:
            raise ConfigError(f"--field must be ROLE=COLUMN, got {text!r}")
        fields[role] = column
    return fields
