"""Options that several verbs take; defaults stand there: `dtype: DtypeOption = "float32"`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloom.config.fields import (
    AttnImplementation,
    BaseDtype,
    Dtype,
    check_device,
    check_name,
)
from loraloom.config.paths import local_path
from loraloom.config.quantization import parse_quantization
from loraloom.errors import ConfigError, LoraloomError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from loraloom.models.host import Host

RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="auto|HOST:PORT",
        help="Spread the work over the devices of a Ray cluster; auto: the one that runs on this "
        "machine, else one that lasts as long as the command.",
    ),
]
RayWorkersOption = Annotated[
    int | None,
    typer.Option(
        "--ray-workers",
        min=1,
        metavar="N",
        help="With --ray: how many devices; all accelerators by default, or else one worker on "
        "each machine.",
    ),
]


def check_ray_workers(ray: str | None, ray_workers: int | None) -> None:
    """Raise a ConfigError if there are workers without a cluster."""
    if ray_workers is not None and ray is None:
        raise ConfigError("--ray-workers has no effect without --ray; give it")


def parse_adapter(text: str) -> tuple[str, str]:
    """Split `name=path`."""
    name, _, path = text.partition("=")
    if not name or not path:
        raise ConfigError(f"--adapter must be name=path, got {text!r}")
    if name == "base":
        raise ConfigError(
            f"--adapter {text}: name must not be base, which results call the base model by"
        )
    try:
        return check_name(name), path
    except ConfigError as error:
        raise ConfigError(f"--adapter {text}: {error}") from None


def parse_adapters(texts: Sequence[str] | None) -> dict[str, str]:
    """The `--adapter` options of a command as names and where to load them from, in their order."""
    adapters: dict[str, str] = {}
    for text in texts or ():
        name, path = parse_adapter(text)
        if name in adapters:
            raise ConfigError(f"--adapter {text}: name must not be given twice, got {name!r} again")
        adapters[name] = path
    return adapters


def tell_unknown_prompts(host: Host, tokenizer: PreTrainedTokenizerBase) -> None:
    """Say which adapters don't record the form of their prompts, if that makes a difference."""
    names = [name for name, adapter in host.adapters.items() if adapter.prompt is None]
    if names and tokenizer.chat_template:
        typer.echo(
            f"note: {', '.join(names)}: the adapter's files don't record how its training data "
            "wrote prompts; the base model's chat template is used",
            err=True,
        )


def path_option(name: str, **settings: Any) -> Any:
    """An option whose value is a path that the system can be asked about."""
    return typer.Option(name, parser=_path_parser(name), **settings)


def path_argument(metavar: str, **settings: Any) -> Any:
    """An argument that is a path; see `path_option`."""
    return typer.Argument(metavar=metavar, parser=_path_parser(metavar), **settings)


def _path_parser(name: str) -> Callable[[str | Path], Path]:
    def path(text: str | Path) -> Path:
        return local_path(text, name, LoraloomError)  # typer rewords a ConfigError, a ValueError

    return path


BaseModelOption = Annotated[
    str,
    typer.Option(
        "--base-model",
        metavar="MODEL",
        help="Hub id, directory or .gguf file of the base model, or smollm2-135m.",
    ),
]
DtypeOption = Annotated[
    BaseDtype,
    typer.Option(
        "--dtype",
        help="Number format of the base model's weights; auto: the checkpoint's, but float32 on a "
        "CPU that multiplies 16 bits slowly.",
    ),
]
FixedDtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Number format of the base model's weights.")
]
QuantizationOption = Annotated[
    Any,  # what the callback makes of the text
    typer.Option(
        "--quantization",
        parser=str,
        callback=parse_quantization,
        metavar="KIND",
        help="Keep the base model's linear layers in fewer bits: nf4, int8, torchao-int8, "
        "torchao-int4, or a library's settings, {load_in_4bit: true, ...} for one.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        callback=check_device,
        metavar="DEVICE",
        help="auto (an accelerator where there is one), cpu, cuda, cuda:0, xpu or mps.",
    ),
]
AttnOption = Annotated[
    AttnImplementation | None,
    typer.Option(
        "--attn-implementation", help="How attention is computed; transformers chooses by default."
    ),
]
AdapterOption = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter",
        metavar="NAME=PATH",
        help="An adapter to load from a directory or hub id, under this name. May be repeated.",
    ),
]
RunFileArgument = Annotated[
    Path, path_argument("RUN.yaml", help="The run file: a base model and its jobs.")
]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="TEMPLATE",
        help="In place of the tokenizer's: a file, a Jinja text, or trl for its training one.",
    ),
]
PromptTemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        metavar="TEMPLATE",
        help="Write prompts in this prompt template: alpaca, plain, a Jinja text or a file.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="PATH=VALUE",
        help="Change a setting of the run file, jobs.0.train.learning_rate=1e-4 say. "
        "May be repeated.",
    ),
]
