"""`loraloom export`: an adapter in a form that other engines read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from loraloom.cli.options import (
    BaseModelOption,
    DeviceOption,
    QuantizationOption,
    path_option,
)
from loraloom.config.fields import Dtype

_NAME = "adapter"


def export(
    base_model: BaseModelOption,
    adapter: Annotated[
        str,
        typer.Option("--adapter", metavar="PATH", help="The adapter's directory or hub id."),
    ],
    output: Annotated[
        Path,
        path_option(
            "--output",
            metavar="PATH",
            help="Where to: a new directory; for gguf a new file, adapter.gguf say.",
        ),
    ],
    to: Annotated[
        Literal["moe", "merged", "gguf"] | None,
        typer.Option(
            "--to",
            help="moe: a mixture as the mixture-of-experts checkpoint that computes the same; "
            "merged: the base model with a plain adapter in its weights; gguf: a plain adapter for "
            "llama.cpp. By default moe for a mixture, else merged.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option("--dtype", help="Number format of the written weights.")
    ] = "float32",
    device: DeviceOption = "auto",
    quantization: QuantizationOption = None,
) -> None:
    """Write an adapter for other engines: transformers, vLLM, llama.cpp."""
    from loraloom.generation.loading import check_sources, load_host
    from loraloom.models.export import check_target
    from loraloom.models.export import export as write

    check_target(output, to)
    adapters = {_NAME: adapter}
    check_sources(base_model, adapters, device, "float32", quantization)
    host, tokenizer = load_host(base_model, adapters, "float32", device, None, quantization)
    written = write(host, tokenizer, _NAME, output, to, dtype=dtype)
    size = f"{written.num_bytes / 1e6:,.1f} MB in {dtype}"
    typer.echo(f"wrote {written.path}: {written.architecture}, {size}")
    if written.logit_error is not None:
        typer.echo(f"its logits differ from the adapter's by {written.logit_error:.2g} (relative)")
