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
    """Find what can be found wrong before the base model is loaded."""
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
    """Load a base model, its tokenizer, and adapters by name."""
    model, tokenizer = load_base_model(base_model, dtype, device, attn_implementation, quantization)
    host = attach(model)
    for name, path in adapters.items():
        host.load(name, path)
    return host, tokenizer
