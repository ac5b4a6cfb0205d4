"""`loraloom export`: an adapter in a form that other engines read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loraloom.config.model import BaseModelConfig, Dtype
from loraloom.generation.loading import check_sources, load_host
from loraloom.models import export as exporting


class ExportOptions(BaseModelConfig):
    """An adapter on its base model, and the form to write."""

    adapter: str
    """The adapter's directory or hub id."""
    output: Path
    """A new directory to write; for gguf a new file, adapter.gguf for example."""
    to: exporting.ExportForm | None = None
    """moe: a mixture as the mixture-of-experts checkpoint that computes the same; merged: the base
    model with a plain adapter in its weights; gguf: a plain adapter for llama.cpp. By default moe
    for a mixture, else merged."""
    dtype: Dtype = "float32"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Number format of the written weights."""


def export(*, options: Annotated[ExportOptions, Parameter(name="*")]) -> None:
    """Write an adapter for other engines: transformers, vLLM, llama.cpp."""
    exporting.check_target(options.output, options.to)
    adapters = {"adapter": options.adapter}
    model = options.model_copy(update={"dtype": "float32"})
    check_sources(model, adapters)
    host, tokenizer = load_host(model, adapters)
    written = exporting.export(
        host, tokenizer, "adapter", options.output, options.to, dtype=options.dtype
    )
    size = f"{written.num_bytes / 1e6:,.1f} MB in {options.dtype}"
    print(f"wrote {written.path}: {written.architecture}, {size}")
    if written.logit_error is not None:
        print(f"its logits differ from the adapter's by {written.logit_error:.2g} (relative)")
