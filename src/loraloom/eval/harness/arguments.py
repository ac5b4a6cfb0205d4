"""`--model_args` of lm-eval's command line: which base model and adapter to load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from loraloom.config.faults import suggestion
from loraloom.config.fields import check_device
from loraloom.config.quantization import parse_quantization
from loraloom.errors import ConfigError
from loraloom.infer.loading import load_host
from loraloom.models.host import Host

_LOADING: dict[str, Any] = {
    "base_model": None,
    "adapter": None,
    "dtype": "auto",
    "quantization": None,
    "device": "auto",
    "attn_implementation": None,
}
_LM_OPTIONS = ("max_length", "add_bos_token", "prefix_token_id", "max_tokens_per_batch")
_KNOWN = (*_LOADING, *_LM_OPTIONS)


def load_arguments(
    arguments: Mapping[str, Any], command_line: Mapping[str, Any]
) -> tuple[Host, PreTrainedTokenizerBase, str | None, dict[str, Any]]:
    """Load a base model and an adapter on it."""
    device = command_line.get("device") or _LOADING["device"]
    chosen = {**_LOADING, "device": device, **arguments}
    _check(chosen)
    adapters = {} if chosen["adapter"] is None else {"adapter": str(chosen["adapter"])}
    host, tokenizer = load_host(
        str(chosen["base_model"]),
        adapters,
        str(chosen["dtype"]),
        check_device(str(chosen["device"])),
        chosen["attn_implementation"],
        parse_quantization(chosen["quantization"]),
    )
    options = {name: chosen[name] for name in _LM_OPTIONS if name in chosen}
    batch_size = str(command_line.get("batch_size"))
    if batch_size.isdigit():  # else "auto"
        options["batch_size"] = int(batch_size)
    return host, tokenizer, next(iter(adapters), None), options


def _check(arguments: Mapping[str, Any]) -> None:
    for name in arguments:
        if name not in _KNOWN:
            raise ConfigError(
                f"{suggestion(name, _KNOWN)}model_args of loraloom may hold {', '.join(_KNOWN)}, "
                f"got {name!r}"
            )
    if not arguments["base_model"]:
        raise ConfigError(
            "model_args of loraloom must name a base_model; give base_model=M, and adapter=PATH "
            "for an adapter on it"
        )
