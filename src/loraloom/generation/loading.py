"""A base model with adapters from files, ready for inference."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedTokenizerBase

from loraloom.config.model import BaseModelConfig
from loraloom.formats.files import read_stored
from loraloom.formats.hub import find_adapter
from loraloom.models.attach import attach
from loraloom.models.host import Host
from loraloom.models.loading import find_device, load_base_model
from loraloom.models.quantising import check_quantization
from loraloom.models.sources import find_source


def check_sources(model: BaseModelConfig, adapters: Mapping[str, str]) -> None:
    """Find what can be found wrong before the base model is loaded; adapters' files by name."""
    find_source(model.base_model)
    check_quantization(model.quantization, model.dtype, find_device(model.device))
    for path in adapters.values():
        read_stored(find_adapter(path))


def load_host(
    model: BaseModelConfig, adapters: Mapping[str, str]
) -> tuple[Host, PreTrainedTokenizerBase]:
    """Load a base model, its tokenizer, and adapters by name."""
    base, tokenizer = load_base_model(
        model.base_model, model.dtype, model.device, model.attn_implementation, model.quantization
    )
    host = attach(base)
    for name, path in adapters.items():
        host.load(name, path)
    return host, tokenizer
