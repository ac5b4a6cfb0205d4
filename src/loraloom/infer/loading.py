"""A base model with adapters from files, ready for inference."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from loraloom.config.quantization import AnyQuantization
from loraloom.formats.files import read_stored
from loraloom.formats.hub import find_adapter
from loraloom.models.attach import attach
from loraloom.models.host import Host
from loraloom.models.loading import find_device, load_base_model
from loraloom.models.quantising import check_quantization
from loraloom.models.sources import find_source


def check_sources(
    base_model: str,
    adapters: Mapping[str, str],
    device: str,
    dtype: str = "auto",
    quantization: AnyQuantization | None = None,
) -> None:
    """Find what can be found wrong before the base model is loaded.

    Args:
        base_model: Hub name, directory, .gguf file or `smollm2-135m`.
        adapters: Directory or hub id of each adapter by name.
        device: Where the model is to run.
        dtype: Of the base model's weights.
        quantization: How they are to be quantised.

    Raises:
        ModelError: If there is no such model or device, or it can't compute so.
        ConfigError: If the quantisation's library is not installed, or the dtype is none it takes.
        FormatError: If an adapter's files are missing or can't be read.
    """
    find_source(base_model)
    check_quantization(quantization, dtype, find_device(device))
    for path in adapters.values():
        read_stored(find_adapter(path))


def load_host(
    base_model: str,
    adapters: Mapping[str, str],
    dtype: str,
    device: str,
    attn_implementation: str | None,
    quantization: AnyQuantization | None = None,
) -> tuple[Host, PreTrainedTokenizerBase]:
    """Load a base model, its tokenizer, and adapters by name.

    Args:
        base_model: Hub name, directory, .gguf file or `smollm2-135m`.
        adapters: Directory or hub id of each adapter by name.
        dtype: Of the base model's weights.
        device: Where the model runs.
        attn_implementation: None leaves it to transformers.
        quantization: How the base model's weights are quantised; None for not at all.

    Raises:
        ModelError: If the model can't be loaded or attached to.
        FormatError: If an adapter's files can't be read.
        AdapterError: If an adapter is for another base model.
    """
    model, tokenizer = load_base_model(base_model, dtype, device, attn_implementation, quantization)
    host = attach(model)
    for name, path in adapters.items():
        host.load(name, path)
    return host, tokenizer
