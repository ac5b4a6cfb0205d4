"""Options that several verbs take; defaults stand there: `dtype: DtypeOption = "float32"`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from loraloom.config.fields import AttnImplementation, Dtype, check_device, check_name
from loraloom.errors import ConfigError


def parse_adapter(text: str) -> tuple[str, str]:
    """Split `name=path`.

    Returns:
        The adapter's name, and the directory or hub id to load it from.

    Raises:
        ConfigError: If a part is missing or the name is no safe file name, or is `base`.
    """
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
    """The `--adapter` options of a command as names and where to load them from, in their order.

    Raises:
        ConfigError: If one can't be split, or a name is given twice.
    """
    adapters: dict[str, str] = {}
    for text in texts or ():
        name, path = parse_adapter(text)
        if name in adapters:
            raise ConfigError(f"--adapter {text}: name must not be given twice, got {name!r} again")
        adapters[name] = path
    return adapters


BaseModelOption = Annotated[
    str,
    typer.Option(
        "--base-model",
        metavar="MODEL",
        help="Hub id, directory or .gguf file of the base model, or smollm2-135m.",
    ),
]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Number format of the base model's weights.")
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
    Path, typer.Argument(metavar="RUN.yaml", help="The run file: a base model and its jobs.")
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
