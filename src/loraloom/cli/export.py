"""`loraloom export`: an adapter in a form that other engines read."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from loraloom.config.fields import check_name
from loraloom.config.model import BaseModelConfig, Dtype
from loraloom.errors import ConfigError
from loraloom.exports import model as exporting
from loraloom.formats.files import read_stored
from loraloom.generation.loading import load_host


class ExportOptions(BaseModelConfig):
    """The base model, and the form to write."""

    output: Path
    """Write to this new directory or, for gguf, to this new file, adapter.gguf for example."""
    to: exporting.ExportForm | None = None
    """Write an equivalent mixture-of-experts checkpoint (moe, default for a mixture), the base
    model with a plain adapter merged (merged, default for others), or llama.cpp's form of a plain
    adapter (gguf)."""
    dtype: Dtype = "float32"
    """Write weights in this dtype."""


def export(adapter: str, *, options: Annotated[ExportOptions, Parameter(name="*")]) -> None:
    """Write an adapter for other engines: transformers, vLLM, llama.cpp.

    Args:
        adapter: Directory or Hub ID of the adapter.
    """
    exporting.check_target(options.output, options.to)
    name = "adapter"
    with suppress(ConfigError):
        name = check_name(Path(adapter).name)
    model = options.model_copy(update={"dtype": "float32"})
    host, tokenizer = load_host(model, {name: read_stored(adapter)})
    written = exporting.export(
        host, tokenizer, name, options.output, options.to, dtype=options.dtype
    )
    size = f"{written.num_bytes / 1e6:,.1f} MB in {options.dtype}"
    print(f"wrote {written.path}: {written.architecture}, {size}")
    if written.logit_error is not None:
        print(f"relative difference from the adapter's logits: {written.logit_error:.2g}")
