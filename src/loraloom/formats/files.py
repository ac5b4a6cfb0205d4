"""Adapters to and from directories, whichever layout they are in.

    peft         PEFT's layout (peft.py), also that of MoE-PEFT's and mLoRA's plain adapters
    reference    MoE-PEFT's layout of mixtures (reference.py), its pickles and our safetensors
    native       our own names (native.py), for methods that no other library has
    older names  brought up to date first (legacy.py)

`peft_type` in adapter_config.json says which method it is, and the method says which layout. What
another program has written for a method is brought into that method's layout first.

Code in a pickle is never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loraloom.adapters import CONFIGS
from loraloom.adapters.base import BaseInfo
from loraloom.adapters.files import CONFIG_FILE, AdapterFiles
from loraloom.adapters.method import AdapterConfig
from loraloom.adapters.own import tensor_shapes
from loraloom.config.data import PromptForm
from loraloom.errors import AdapterError, shown
from loraloom.formats import axolotl, legacy, native, peft, reference
from loraloom.formats.card import model_card
from loraloom.formats.contents import SIDECAR_WEIGHTS, BaseRecord, StoredAdapter, names_in
from loraloom.formats.disk import read_files, refuse_to_overwrite, replace_files
from loraloom.formats.fit import check_shapes, fit_to_base
from loraloom.formats.hub import find_adapter
from loraloom.formats.own import own_fields, own_names, set_apart

_LAYOUTS = {"peft": peft, "reference": reference, "native": native}


def read_adapter(
    path_or_hub_id: str | Path, base: BaseInfo, settings: Mapping[str, Any] | None = None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read an adapter for a base model."""
    return fit_to_base(read_stored(find_adapter(path_or_hub_id), settings), base)


def read_stored(directory: Path, settings: Mapping[str, Any] | None = None) -> StoredAdapter:
    """Read an adapter as its files describe it, with no base model at hand."""
    return parse_files(replace(read_files(directory), given=settings or {}))


def parse_files(files: AdapterFiles) -> StoredAdapter:
    """Find out the layout from configuration and names, and understand the files by it."""
    if legacy.is_legacy(files):
        files = legacy.upgrade(files)
    files = set_apart(files, {part for method in CONFIGS for part in peft.part_names(method)})
    files = axolotl.adopted(reference.without_experts(files))
    if files.sidecar is not None:
        raise files.error(
            f"{SIDECAR_WEIGHTS} doesn't go with `peft_type` "
            f"{shown(files.config.get('peft_type'))}; move it elsewhere if it isn't a part of the "
            "adapter"
        )
    peft_type = files.config.get("peft_type")
    if peft_type is None and "routing_strategy" in files.config:
        peft_type = files.config["routing_strategy"].partition("-")[0].upper()
    methods = {method.peft_type: method for method in CONFIGS}
    method = methods.get(peft_type or "")
    if method is None:
        known = ", ".join(methods)
        raise files.error(
            f"`peft_type` in {CONFIG_FILE} must be one of {known}, got {shown(peft_type)}"
        )
    return _LAYOUTS[method.layout].parse(files, method)


def write_adapter(
    directory: str | Path,
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    base: BaseInfo,
    card: str | None = None,
    *,
    prompt: PromptForm | None = None,
    overwrite: bool = False,
) -> None:
    """Save an adapter: adapter_config.json, adapter_model.safetensors and README.md.

    Other files in the directory stay. The three are written aside and renamed (disk.py).
    """
    directory = Path(directory)
    if not overwrite:
        refuse_to_overwrite(directory)
    _check_complete(config, tensors, base)
    files = render_files(config, tensors, base, prompt)
    card = model_card(config, base, prompt=prompt) if card is None else card
    replace_files(directory, files, card)


def render_files(
    config: AdapterConfig,
    tensors: dict[str, Tensor],
    base: BaseInfo,
    prompt: PromptForm | None = None,
) -> AdapterFiles:
    """Lay an adapter out as its method's files are."""
    record = BaseRecord(
        base.name_or_path or None,
        base.model_type or None,
        base.fingerprint or None,
        base.num_parameters or None,
        base.quantization,
        prompt,
    )
    own = own_names(tensors)
    others = {name: tensor for name, tensor in tensors.items() if name not in own}
    files = _LAYOUTS[config.layout].render(config, others, base, record)
    return replace(
        files,
        config=files.config | own_fields(config, base),
        tensors=files.tensors | {name: tensors[key] for key, name in own.items()},
    )


def _check_complete(config: AdapterConfig, tensors: dict[str, Tensor], base: BaseInfo) -> None:
    shapes = tensor_shapes(config, base)
    odd = sorted(shapes.keys() ^ tensors.keys())
    if odd:
        raise AdapterError(
            f"tensors must be exactly those of the configuration, missing or extra: {names_in(odd)}"
        )
    check_shapes("the adapter to save", tensors, shapes, base)
