"""Adapters to and from directories, what they say, and whether one fits a base model.

`peft_type` in adapter_config.json says which method it is, and the method says which layout
(layouts.py). What another program has written for a method is brought into that method's layout
first (foreign.py). All that could be wrong is found before a weight is copied.
"""

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment
from torch import Tensor

from loraloom.adapters import CONFIGS
from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.extra_modules import MODULES, TOKENS, tensor_shapes
from loraloom.adapters.tensor_names import Shape, TensorKey, within
from loraloom.base.blocks import BaseInfo
from loraloom.base.targets import select
from loraloom.config.data import PromptForm
from loraloom.config.text import to_yaml
from loraloom.errors import AdapterError, FormatError, names_in, shown
from loraloom.formats import raw_files
from loraloom.formats.experts import INTERLEAVED
from loraloom.formats.fields import last_words
from loraloom.formats.foreign import of_axolotl, up_to_date
from loraloom.formats.layouts import LABELS, BaseRecord, StoredAdapter, parse, render

_KINDS = {"router": "router", "magnitude": "magnitudes"}


def read_adapter(
    path_or_hub_id: str | Path, base: BaseInfo, settings: Mapping[str, Any] | None = None
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    return fit_to_base(read_stored(path_or_hub_id, settings), base)


def read_adapters(paths: Mapping[str, str]) -> dict[str, StoredAdapter]:
    return {name: read_stored(path) for name, path in paths.items()}


def read_stored(
    path_or_hub_id: str | Path, settings: Mapping[str, Any] | None = None
) -> StoredAdapter:
    """Read an adapter as its files describe it, with no base model at hand."""
    directory = raw_files.find_adapter(path_or_hub_id)
    files = raw_files.read_files(directory)
    return parse_files(replace(files, overrides=settings or {}))


def parse_files(files: raw_files.AdapterFiles) -> StoredAdapter:
    """Find out the method from the configuration, and understand the files by its layout."""
    methods = {method.peft_type: method for method in CONFIGS}
    try:
        if files.sidecar is not None:
            return of_axolotl(files, files.sidecar)
        files = up_to_date(files)
        peft_type = files.config.get("peft_type")
        if peft_type is None and "routing_strategy" in files.config:
            peft_type = files.config["routing_strategy"].partition("-")[0].upper()
        if peft_type in methods:
            return parse(files, methods[peft_type])
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, re.error) as error:
        raise files.error(f"{raw_files.CONFIG_FILE} is not valid: {error}") from error
    package = files.section("loraloom").get("package")
    writer = f" of the package {shown(package)}" if package else ""
    raise files.error(
        f"`peft_type` in {raw_files.CONFIG_FILE} must be one of {', '.join(methods)}, got "
        f"{shown(peft_type)}{writer}; install a package that provides this method as an entry "
        "point of loraloom.methods, or call loraloom.register_method first"
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
    """Save an adapter: adapter_config.json, adapter_model.safetensors and README.md."""
    directory = Path(os.path.expanduser(directory))
    if not overwrite:
        raw_files.refuse_to_overwrite(directory)
    card = model_card(config, base, prompt=prompt) if card is None else card
    raw_files.replace_files(directory, render(config, tensors, base, prompt), card)


def fit_to_base(stored: StoredAdapter, base: BaseInfo) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Check an adapter against a base model and give it in its final form."""
    if stored.has_single_experts and base.model_type in INTERLEAVED:
        raise AdapterError(
            f"{stored.source} has gate and up of each expert apart, which {base.model_type} "
            "interleaves; save the adapter from PEFT with target_parameters"
        )
    try:
        config = _with_targets(stored, base)
        shapes = tensor_shapes(config, base)
    except AdapterError as error:
        raise AdapterError(
            f"{stored.source} doesn't fit the base model {base.name_or_path}: {error}"
        ) from error
    magnitudes = {name for name in shapes if name.endswith(".magnitude")}
    if magnitudes and not magnitudes & stored.tensors.keys():
        warnings.warn(
            f"{stored.source} is a DoRA without magnitudes, as saved by MoE-PEFT. Loading "
            "continues with the norms of the base model's rows. To load a LoRA, as MoE-PEFT "
            "does, pass settings={'weight_decomposition': False}.",
            stacklevel=3,
        )
        shapes = {name: shape for name, shape in shapes.items() if name not in magnitudes}
    _check_tensors(stored, shapes, base)
    _warn_if_another_base(stored, base)
    # Files may be in 16 bits, training is not: in bfloat16 small steps would be rounded away.
    tensors = {}
    for name in shapes:
        tensor = stored.tensors[name]
        tensors[name] = tensor.to(torch.promote_types(torch.float32, tensor.dtype))
    return config, tensors


def _with_targets(stored: StoredAdapter, base: BaseInfo) -> AdapterConfig:
    """Name the projections that an adapter's files mean on a base model as its targets."""
    layers = base.layers_without_weights()
    projections = {
        projection.key: projection for layer in layers for projection in layer.projections
    }
    parsed = map(TensorKey.parse, stored.tensors)
    keys = {key.place for key in parsed if key is not None and key.projection is not None}
    if stored.layout == LABELS["native"]:
        keys |= select(stored.config.target_modules, layers).keys
        if keys <= stored.config.targeted_keys(layers):
            return stored.config
    # What a file adapts is what has tensors; where a listed layer has none, they are missing.
    for key in select(stored.listed, layers).keys:
        base_projection = projections[key]
        index = int(key.split(".")[1])
        in_layers = stored.listed_layers is None or index in stored.listed_layers
        if in_layers and base_projection.has_weight and base_projection.num_experts is None:
            keys.add(key)
    _check_are_projections(keys - projections.keys(), base)
    return stored.config.with_targets(keys & projections.keys(), layers)


def _check_are_projections(keys: Set[str], base: BaseInfo) -> None:
    """Raise an AdapterError if an adapter is on modules of the model that none here can adapt."""
    paths = {key: key.replace("layers", base.layers_path, 1) for key in sorted(keys)}
    refused = [path for path in paths.values() if path in base.module_paths]
    if refused:
        raise AdapterError(
            f"it adapts {names_in(refused)}, and only projections of attention, FFN blocks and "
            "experts can be adapted, no routers or other linear layers; train with their names as "
            "target_modules in place of all-linear"
        )


def _check_tensors(stored: StoredAdapter, shapes: Mapping[str, Shape], base: BaseInfo) -> None:
    actual = {name: tuple(tensor.shape) for name, tensor in stored.tensors.items()}
    faults = {
        "missing tensors": [name for name in shapes if name not in actual],
        "unexpected tensors": [name for name in actual if name not in shapes],
        "tensors of other shapes": [
            f"{name} {actual[name]}, not {shape}"
            for name, shape in shapes.items()
            if actual.get(name, shape) != shape
        ],
    }
    details = [f"{kind}: {names_in(names, limit=2)}" for kind, names in faults.items() if names]
    if details:
        raise AdapterError(
            f"{stored.source} doesn't fit the base model {base.name_or_path} ({base.model_type}). "
            "Load the base model that the adapter was trained on, "
            f"{stored.base.name_or_path or 'whose name is not recorded'}; if tokens were added to "
            f"that model, resize its embeddings first ({'; '.join(details)})"
        )
    infinite = [name for name, tensor in stored.tensors.items() if not tensor.isfinite().all()]
    if infinite:
        raise FormatError(
            f"{stored.source}: weights must be finite, got infinite ones or NaN in "
            f"{names_in(infinite)}; training has diverged; use an earlier checkpoint"
        )


def _warn_if_another_base(stored: StoredAdapter, base: BaseInfo) -> None:
    """Warn of a base model of the same shapes that isn't the adapter's own."""
    if base.has_fingerprint(stored.base.fingerprint):
        return
    with_fingerprint = stored.base.fingerprint is not None
    if not with_fingerprint:
        # Other programs' files have nothing but a name; paths differ from place to place.
        paths = (stored.base.name_or_path, base.name_or_path)
        names = {Path(path or "").name.lower() for path in paths}
        if "" in names or len(names) == 1:
            return
    trained_on = _describe_model(stored.base, with_fingerprint)
    warnings.warn(
        f"{stored.source} was trained on {trained_on}, but the base model here is "
        f"{_describe_model(base, with_fingerprint)}. "
        "Loading continues; outputs differ by rounding if one model is the other quantized, and "
        f"may be wrong otherwise. Load {trained_on} instead.",
        stacklevel=4,
    )


def _describe_model(model: BaseRecord | BaseInfo, with_fingerprint: bool) -> str:
    name = model.name_or_path or "a model without a name"
    if not with_fingerprint:
        return name
    return f"{name} ({model.quantization or 'floating point'}, fingerprint {model.fingerprint})"


def describe(path_or_hub_id: str | Path) -> dict[str, Any]:
    """Give an adapter's method, settings and sizes, as `inspect --json` prints them."""
    # Parameters are the adapter's, by kind, without what all layers share.
    directory = raw_files.find_adapter(path_or_hub_id)
    stored = read_stored(directory)
    config, base = stored.config, stored.base
    tensors = stored.tensors.values()
    keys = list[TensorKey]()
    parameters = Counter[str]()
    for name, tensor in stored.tensors.items():
        key = TensorKey.parse(within(name))
        if key is not None:
            keys.append(key)
            parameters[_parameter_kind(key)] += tensor.numel()
        elif name.startswith(TOKENS):
            parameters["tokens"] += tensor.numel()
        elif name.startswith(MODULES):
            parameters["modules_to_save"] += tensor.numel()
    paths = [key.path for key in keys if key.projection is not None]
    files = [directory / name for name in raw_files.ADAPTER_FILES]
    total = parameters.total()
    return {
        "path": str(path_or_hub_id),
        "layout": stored.layout,
        "method": config.title,
        "formula": config.formula,
        "settings": config.model_dump(mode="json", exclude_none=True, exclude={"target_modules"}),
        "target_modules": list(dict.fromkeys(map(last_words, paths))),
        "base_model": base.name_or_path,
        "base_fingerprint": base.fingerprint,
        "prompt": stored.prompt and stored.prompt.model_dump(exclude_none=True),
        "num_layers": len({key.layer for key in keys}),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
        "parameters": dict(parameters),
        "num_parameters": total,
        "num_base_parameters": base.num_parameters,
        "percent_of_base": 100 * total / base.num_parameters if base.num_parameters else None,
        "num_non_finite": sum(not tensor.isfinite().all() for tensor in tensors),
        "file_bytes": {path.name: path.stat().st_size for path in files if path.exists()},
    }


def _parameter_kind(key: TensorKey) -> str:
    """Count a tensor as a router's, an expert's or a LoRA's, or by its own name."""
    if key.part in _KINDS:
        return _KINDS[key.part]
    if key.expert is not None:
        return f"{key.block} experts"
    return f"{key.block} LoRA" if key.part in ("lora_A", "lora_B") else f"{key.block} {key.part}"


def model_card(
    config: AdapterConfig,
    base: BaseInfo,
    *,
    name: str | None = None,
    data: str | None = None,
    results: str | None = None,
    prompt: PromptForm | None = None,
) -> str:
    """Write a short model card: base, method, and what is known of prompts, data and results."""
    base_name = base.name_or_path
    front: dict[str, Any] = {
        "library_name": "peft" if config.layout == "peft" else "loraloom",
        "pipeline_tag": "text-generation",
        "tags": ["loraloom", config.title.lower()],
    }
    # The Hub takes no local path.
    if raw_files.HUB_ID.fullmatch(base_name) and not Path(base_name).exists():
        front = {"base_model": base_name, **front}
        front["tags"].append(f"base_model:adapter:{base_name}")
    settings = config.model_dump(mode="json", exclude_none=True)
    settings = {name: value for name, value in settings.items() if value not in ([], {})}
    return (
        Environment(trim_blocks=True, keep_trailing_newline=True)
        .from_string(Path(__file__).with_name("card.md.jinja").read_text("utf-8"))
        .render(
            {"config": config, "base": base, "name": name, "data": data, "results": results},
            base_model=repr(base_name or "base-model"),
            front=to_yaml(front),
            settings=to_yaml({"adapter": settings}),
            prompt=prompt and to_yaml(prompt.model_dump(exclude_none=True)),
        )
    )
