"""Options of `serve`; defaults stand there: `dtype: DtypeOption = "float32"`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loraloom.config.model import AttnImplementation, BaseDtype, check_device, parse_quantization
from loraloom.config.text import local_path
from loraloom.errors import LoraloomError

if TYPE_CHECKING:
    pass


def path_option(name: str, **settings: Any) -> Any:
    """An option whose value is a path that the system can be asked about."""
    return typer.Option(name, parser=_path_parser(name), **settings)


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
ChatTemplateOption = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="TEMPLATE",
        help="In place of the tokenizer's: a file, a Jinja text, or trl for its training one.",
    ),
]
