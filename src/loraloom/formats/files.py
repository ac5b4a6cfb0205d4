"""Adapters to and from directories, and whether a stored one fits a base model.

`peft_type` in adapter_config.json says which method it is, and the method says which layout
(layouts.py). What another program has written for a method is brought into that method's layout
first (foreign.py). All that could be wrong is found before a weight is copied.

Axes: I in_features, O out_features, R rank.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraloom.adapters import CONFIGS
from loraloom.adapters.base import BaseInfo
from loraloom.adapters.keys import Shape, TensorKey
from loraloom.adapters.method import AdapterConfig
from loraloom.adapters.own import MODULES, TOKENS, tensor_shapes
from loraloom.config.data import PromptForm
from loraloom.errors import AdapterError, FormatError, shown
from loraloom.formats.card import model_card
from loraloom.formats.disk import (
    CONFIG_FILE,
    AdapterFiles,
    names_in,
    read_files,
    refuse_to_overwrite,
    replace_files,
)
from loraloom.formats.fields import known_targets
from loraloom.formats.foreign import adopted, of_axolotl
from loraloom.formats.hub import find_adapter
from loraloom.formats.layouts import StoredAdapter, parse, render


def read_adapter(
    path_or_hub_id: str | Path, base: BaseInfo, settings: Mapping[str, Any] | None = None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    return fit_to_base(read_stored(find_adapter(path_or_hub_id), settings), base)


def read_stored(directory: Path, settings: Mapping[str, Any] | None = None) -> StoredAdapter:
    """Read an adapter as its files describe it, with no base model at hand."""
    return parse_files(replace(read_files(directory), given=settings or {}))


def parse_files(files: AdapterFiles) -> StoredAdapter:
    """Find out the method from the configuration, and understand the files by its layout."""
    methods = {method.peft_type: method for method in CONFIGS}
    try:
        if files.sidecar is not None:
            return of_axolotl(files, files.sidecar)
        files = adopted(files)
        peft_type = files.config.get("peft_type")
        if peft_type is None and "routing_strategy" in files.config:
            peft_type = files.config["routing_strategy"].partition("-")[0].upper()
        if peft_type in methods:
            return parse(files, methods[peft_type])
    except (TypeError, ValueError, AttributeError) as error:  # of fields of another kind
        raise files.error(f"{CONFIG_FILE} can't be used: {error}") from error
    raise files.error(
        f"`peft_type` in {CONFIG_FILE} must be one of {', '.join(methods)}, got {shown(peft_type)}"
    )


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
    _check_tensors(AdapterError, "the adapter to save", tensors, tensor_shapes(config, base), base)
    card = model_card(config, base, prompt=prompt) if card is None else card
    replace_files(directory, render(config, tensors, base, prompt), card)


def fit_to_base(stored: StoredAdapter, base: BaseInfo) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Check an adapter against a base model and give it in its final form."""
    _check_modules(stored, base)
    targets = known_targets(stored.config, base)
    if not targets:
        raise FormatError(f"{stored.source}: no tensors and no `target_modules` of the base model")
    fields = stored.config.model_dump() | {"target_modules": targets}
    config = type(stored.config).model_validate(fields)
    try:
        shapes = tensor_shapes(config, base)
    except AdapterError as error:
        raise AdapterError(f"{stored.source}: {error}") from error
    magnitudes = {name for name in shapes if name.endswith(".magnitude")}
    if magnitudes and not magnitudes & stored.tensors.keys():
        warnings.warn(
            f"{stored.source} is a DoRA without magnitudes, as MoE-PEFT, which doesn't train them "
            "either, saves it; those it had in training are taken, the norms of the base model's "
            "rows. (MoE-PEFT itself makes a LoRA of it on loading: "
            "settings={'weight_decomposition': False})",
            stacklevel=3,
        )
        shapes = {name: shape for name, shape in shapes.items() if name not in magnitudes}
    _check_tensors(FormatError, stored.source, stored.tensors, shapes, base)
    odd = [name for name, tensor in stored.tensors.items() if not tensor.isfinite().all()]
    if odd:
        raise FormatError(
            f"{stored.source}: weights must be finite, got infinite ones or NaN in "
            f"{names_in(odd)}; its training has diverged, take an earlier checkpoint"
        )
    _warn_if_another_base(stored, base)
    # Files may be in 16 bits, training is not: in bfloat16 small steps would be rounded away.
    wide = {name: torch.promote_types(torch.float32, stored.tensors[name].dtype) for name in shapes}
    return config, {name: stored.tensors[name].to(dtype) for name, dtype in wide.items()}


def _check_modules(stored: StoredAdapter, base: BaseInfo) -> None:
    """Raise an error if the adapter's names are of another kind of base model."""
    keys = [key for key in map(TensorKey.parse, stored.tensors) if key is not None]
    known = {*base.shapes, f"{base.ffn}.router"}
    foreign = list(dict.fromkeys(key.path for key in keys if key.path not in known))
    num_layers = 1 + max((key.layer for key in keys), default=-1)
    in_every_layer = stored.config.in_every_layer and base.attention_layers is None
    reason = ""
    if stored.layers_path not in (None, base.layers_path):
        reason = f"its layers are at {stored.layers_path}"
    elif foreign:
        reason = f"it changes modules that aren't there: {names_in(foreign)}"
    elif num_layers > base.num_layers or (0 < num_layers < base.num_layers and in_every_layer):
        reason = f"it has {num_layers} layers, not {base.num_layers}"
    if reason:
        raise AdapterError(
            f"{stored.source} is an adapter for another base model than {base.name_or_path} "
            f"({base.model_type}): {reason}; it was made for "
            f"{stored.base.name_or_path or 'one that it does not name'}"
        )


def _check_tensors(
    error: type[Exception],
    source: str,
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, Shape],
    base: BaseInfo,
) -> None:
    faults = [
        f"{kind} tensors: {names_in(names)}"
        for kind, names in (
            ("missing", [name for name in shapes if name not in tensors]),
            ("unexpected", [name for name in tensors if name not in shapes]),
        )
        if names
    ]
    if faults:
        raise error(
            f"{source}: {'; '.join(faults)}; every layer must have all target modules and experts "
            "that the configuration names, and the adapter all modules_to_save"
        )
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            advice = "; if tokens were added to it, resize its embeddings first"
            raise AdapterError(
                f"{source}: `{name}` must have shape {shape} on the base model "
                f"{base.name_or_path}, got {tuple(tensors[name].shape)}; use the base model that "
                f"the adapter was trained on{advice if name.startswith(MODULES) else ''}"
            )


def _warn_if_another_base(stored: StoredAdapter, base: BaseInfo) -> None:
    """Warn of a base model of the same shapes that isn't the adapter's own.

    The files of other programs have no fingerprint, but a name: paths differ from place to place,
    so the last part alone is compared.
    """
    then, here = stored.base.name_or_path or "", base.name_or_path
    consequence = "its outputs may be wrong. Load the base model it was trained on."
    if stored.base.fingerprint is None:
        if not then or not here or Path(then).name.lower() == Path(here).name.lower():
            return
        difference = "its files don't tell whether the weights are the same"
    elif stored.base.fingerprint == base.fingerprint:
        return
    elif stored.base.quantization != base.quantization:
        kinds = [kind or "floating point" for kind in (stored.base.quantization, base.quantization)]
        difference = f"it had weights in {kinds[0]}, here they are in {kinds[1]}"
        consequence = "outputs differ by the rounding; if it is another model, they may be wrong."
    else:
        own = (stored.base.fingerprint, base.fingerprint)
        difference = "weights differ: fingerprint {}, here {}".format(*own)
    warnings.warn(
        f"{stored.source} was trained on {then or 'a model without a name'}, the base model here "
        f"is {here or 'one without'} ({difference}). It loads, but {consequence}",
        stacklevel=4,
    )


def seen_base(stored: StoredAdapter) -> BaseInfo:
    """Describe a base model that isn't loaded by the names and shapes of an adapter's tensors."""
    keys = {key: t for name, t in stored.tensors.items() if (key := TensorKey.parse(name))}
    sizes: dict[str, dict[str, int]] = {}  # (O, I) of each projection by B, [O, R], and A, [R, I]
    for key, tensor in keys.items():
        if key.projection is not None:
            axis = {"lora_A": 1, "lora_B": 0}.get(key.part)
            own = sizes.setdefault(key.path, {})
            own |= {} if axis is None or tensor.dim() != 2 else {key.part: tensor.shape[axis]}
    if not sizes or any(len(own) < 2 for own in sizes.values()):
        raise FormatError(
            f"{stored.source}: tensors don't tell the shapes of the base model's projections; give "
            "the base model: --base-model"
        )
    # The FFN block has the router of a block, or isn't called attention.
    routed = [key for key in keys if key.projection is None]
    ffn = next((key.block for key in [*routed, *keys] if "att" not in key.block), "mlp")
    attention = next((key.block for key in keys if key.block != ffn), "self_attn")
    order = [name.rpartition(".")[2] for name in stored.config.target_modules]
    paths = dict.fromkeys(path for name in order for path in sizes if path.endswith(f".{name}"))
    num_layers = 1 + max(key.layer for key in keys)
    attended = tuple(sorted({key.layer for key in keys if key.block == attention}))
    modules: dict[str, dict[str, Shape]] = {}
    tables = []
    for name, tensor in stored.tensors.items():
        if name.startswith(MODULES):
            path, _, parameter = name.removeprefix(MODULES).rpartition(".")
            modules.setdefault(path, {})[parameter] = tuple(tensor.shape)
        elif name.startswith(TOKENS):
            tables.append(name.removeprefix(TOKENS))
            modules[tables[-1]] = {"weight": (sys.maxsize, tensor.shape[-1])}
    embedding, head = [*tables, "", ""][:2]

    def names(block: str) -> tuple[str, ...]:
        own = (path for path in paths if path.startswith(f"{block}."))
        return tuple(path.partition(".")[2] for path in own)

    return BaseInfo(
        name_or_path=stored.base.name_or_path or "",
        model_type=stored.base.model_type or "",
        layers_path=stored.layers_path or "model.layers",
        attention=attention,
        ffn=ffn,
        attention_projections=names(attention),
        ffn_projections=names(ffn),
        activation=stored.activation or "",
        num_layers=num_layers,
        hidden_size=next((keys[key].shape[-1] for key in routed), 0),
        shapes={path: (own["lora_B"], own["lora_A"]) for path, own in sizes.items()},
        num_parameters=stored.base.num_parameters or 0,
        fingerprint=stored.base.fingerprint or "",
        quantization=stored.base.quantization,
        modules=modules,
        embedding=embedding,
        head=head,
        attention_layers=attended if 0 < len(attended) < num_layers else None,
        has_own_names=".language_model" not in (stored.layers_path or ""),
    )
