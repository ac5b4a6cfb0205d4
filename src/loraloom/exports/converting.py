"""An adapter's files in another program's form."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.extra_modules import refuse_own_parts, tensor_shapes
from loraloom.base.blocks import BaseInfo
from loraloom.config.data import PromptForm
from loraloom.errors import AdapterError, ConfigError, ModelError, shown
from loraloom.formats.engines import as_peft_holds, engine_files
from loraloom.formats.fields import TABLES
from loraloom.formats.files import fit_to_base, model_card, read_stored
from loraloom.formats.layouts import StoredAdapter, render
from loraloom.formats.raw_files import write_new

if TYPE_CHECKING:
    from loraloom.host.host import Host

# Whose form: what `Host.save` writes, PEFT's, MoE-PEFT's, or what an engine loads.
Program = Literal["native", "peft", "reference", "vllm", "sglang"]

_LEAST_DROPOUT = 1e-6  # MoE-PEFT refuses a dropout of 0, and drops at inference as well


def convert(
    source: str | Path,
    destination: str | Path,
    to: Program,
    *,
    settings: Mapping[str, Any] | None = None,
    host: Host | None = None,
) -> AdapterConfig:
    """Write an adapter for another program, and return its configuration.

    Args:
        source: Directory or Hub ID, in any layout that `Host.load` reads.
        destination: New directory.
        to: Layout to write: `native` as `Host.save`, `peft`, `reference` for MoE-PEFT, `vllm` or
            `sglang`.
        settings: Settings of the method, as in `Host.load`.
        host: Base model of the adapter. Required if files lack the magnitudes of a DoRA, and if the
            base model that they name is neither at that path nor on the Hub.

    Raises:
        FormatError: If the files cannot be read.
        AdapterError: If the other program has no such adapter, or the destination exists.
    """
    if to not in get_args(Program):
        raise ConfigError(
            f"an adapter is converted to one of {', '.join(get_args(Program))}, got {shown(to)}"
        )
    config, tensors, base, prompt = _read(source, settings, host)
    path = Path(os.path.expanduser(destination))
    if to == "peft":
        config, tensors = as_peft_holds(config, tensors, base)
    if to == "vllm" or to == "sglang":
        files = engine_files(config, tensors, base, to)
    else:
        files = render(config, tensors, base, prompt)
    if to == "reference":
        refuse_own_parts(config, "the adapter", "be read by MoE-PEFT")
        _check_reference_holds(config)
        fields = {**files.config, "lora_dropout": max(config.dropout, _LEAST_DROPOUT)}
        expert = fields.get("expert_lora")
        if expert and "lora_dropout" in expert:
            dropout = max(expert["lora_dropout"], _LEAST_DROPOUT)
            fields["expert_lora"] = {**expert, "lora_dropout": dropout}
        files = replace(files, config=fields, metadata={})
    write_new(path, files, model_card(config, base, prompt=prompt), pickled=to == "reference")
    return config


def _check_reference_holds(config: AdapterConfig) -> None:
    """Raise an AdapterError if MoE-PEFT 2.0.2 has no such adapter."""
    table = TABLES.get(config.peft_type)
    settings = config.model_dump()
    hint = ""
    if table is None or table.moe_peft is None:
        raise AdapterError(f"MoE-PEFT does not support {config.title}")
    faults = {}
    for name, value in table.moe_peft.items():
        if settings[name] != value:
            faults[name] = settings[name]
    if settings.get("compat", "") is None:  # of methods that can be computed as MoE-PEFT does
        if settings["temperature"] != 1:
            faults["temperature"] = settings["temperature"]
        if settings["routing"] == "switch":
            faults["routing"] = settings["routing"]
        if faults.keys() & {"temperature", "routing"}:
            hint = "; --set compat=moe-peft makes it the adapter that MoE-PEFT computes"
    for loras in (settings, settings.get("experts") or {}):
        if not float(loras.get("alpha") or 1).is_integer():
            faults["alpha"] = loras["alpha"]
        if loras.get("weight_decomposition"):  # its files have no place for magnitudes
            faults["weight_decomposition"] = True
    if not isinstance(settings.get("num_experts", 0), int):
        faults["num_experts"] = settings["num_experts"]
    if any("." in target for target in config.target_modules):
        faults["target_modules"] = config.target_modules
    if faults:
        text = ", ".join(f"{name}: {shown(value)}" for name, value in faults.items())
        raise AdapterError(f"MoE-PEFT 2.0.2 does not support {config.title} with {text}{hint}")


def _read(
    source: str | Path, settings: Mapping[str, Any] | None, host: Host | None
) -> tuple[AdapterConfig, dict[str, Tensor], BaseInfo, PromptForm | None]:
    if host is not None:
        name = f"converted-{secrets.token_hex(4)}"  # which none of the host's has
        adapter = host.load(name, source, settings)
        host.remove(name)
        config = adapter.config
        if getattr(config, "layers", None) == tuple(range(host.base.num_layers)):  # a pattern's
            config = config.model_copy(update={"layers": None})
        return config, adapter.tensors(), host.base, adapter.prompt
    stored = read_stored(source, settings)
    base = _base_of(stored)
    config, tensors = fit_to_base(stored, base)
    if tensors.keys() != tensor_shapes(config, base).keys():
        raise AdapterError(f"{stored.source} contains no magnitudes; pass --base-model")
    return config, tensors, base, stored.prompt


def _base_of(stored: StoredAdapter) -> BaseInfo:
    """Describe the base model that an adapter's files name, by its configuration."""
    # With transformers, which `inspect` does without.
    from loraloom.base.loading import build_base_model
    from loraloom.base.structure import read_structure

    try:
        model = build_base_model(stored.base.name_or_path or "", "float32", "cpu", None)
    except ModelError as error:
        raise AdapterError(
            f"converting {stored.source} requires its base model's configuration, but {error}; "
            "pass --base-model"
        ) from error
    return replace(
        read_structure(model).info,
        name_or_path=stored.base.name_or_path or "",
        # Only weights have these.
        fingerprint=stored.base.fingerprint or "",
        quantization=stored.base.quantization,
    )
