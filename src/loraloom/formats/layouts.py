"""How adapters lie in their files: the tensors' names in three layouts, and what is known of them.

    peft        base_model.model.{layers_path}.{L}.{block}.{projection}.{part}         PEFT's
    reference   {method}.layers.{L}.{block}[.{projection}][.experts.{e}].{part}.weight MoE-PEFT's
    native      base_model.model.{key of tensor_names.py}      for methods that no other library has
    all three   base_model.model.{path}.{parameter}    a module of modules_to_save
                base_model.model.{path}.token_adapter.trainable_tokens_delta    some tokens' rows

The method says which layout it has. PEFT saves a magnitude without `.weight` and reads it either
way; so do we. PEFT warns about fields that it doesn't know, so what loraloom remembers of the base
model is in the header of its safetensors file, elsewhere under `"loraloom"` in adapter_config.json,
with the settings that MoE-PEFT's layout has no field for. Families that MoE-PEFT lacks have
transformers' own names there.

Source: peft 0.21.2, `peft/tuners/lora/{config,model}.py`, `peft/utils/{other,save_and_load}.py`;
moe-peft 2.0.2, `moe_peft/adapters/`, `moe_peft/model.py`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt
from torch import Tensor

from loraloom.adapters.contract import AdapterConfig
from loraloom.adapters.extra_modules import MODULES, TOKENS
from loraloom.adapters.tensor_names import TensorKey
from loraloom.base.blocks import BaseInfo
from loraloom.base.targets import is_meant
from loraloom.config.data import PromptForm
from loraloom.config.fields import checked
from loraloom.config.text import parse_json
from loraloom.errors import FormatError, names_in, plain, shown
from loraloom.formats.experts import has_single_experts, read_stacks, stack_experts, write_stacks
from loraloom.formats.fields import listed_targets, read_config, write_fields, write_own_fields
from loraloom.formats.raw_files import RECORD, AdapterFiles

# Version of what loraloom adds to files; those with a higher one are refused.
RECORD_VERSION = 1
# What `inspect` calls the layouts.
LABELS = {"peft": "peft", "reference": "moe-peft", "native": "loraloom"}

_PREFIX = "base_model.model."
_LORA = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
# How names end by our parts, in a layout or for a method; native ones are as they are.
_ENDINGS: dict[str, dict[str, str]] = {
    "peft": {**_LORA, "magnitude": "lora_magnitude_vector"},
    "VERA": {
        "lambda_b": "vera_lambda_b",
        "lambda_d": "vera_lambda_d",
        "vera_A": "vera_A",
        "vera_B": "vera_B",
    },
    "reference": {
        **_LORA,
        "magnitude": "lora_magnitude_vector.weight",
        "router": "moe_gate.weight",
    },
}
# Before what all layers share.
_SHARED = {"peft": "base_model.", "reference": "shared.", "native": f"{_PREFIX}shared."}
_TOKENS = ".token_adapter.trainable_tokens_delta"
_TABLE = ".token_adapter.base_layer.weight"
# PEFT saves these beside a resized table's own name.
_COPY = re.compile(r"\.(?:original_module|modules_to_save)\.(?:weight|bias)$")
_WHOLE = re.compile(r"(?:\w+\.)*(?!lora_|vera_)\w+\.(?:weight|bias)", re.ASCII)


Text = Annotated[str, AfterValidator(plain)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


class BaseRecord(_Record):
    """What an adapter's files say of its base model."""

    name_or_path: Text | None = None
    model_type: Text | None = None
    fingerprint: Text | None = None
    num_parameters: NonNegativeInt | None = None
    quantization: Text | None = None


class AdapterRecord(_Record):
    """What loraloom adds to other libraries' fields."""

    version: int = RECORD_VERSION
    base: BaseRecord = BaseRecord()
    adapter: dict[str, Any] = {}  # settings of the method that the layout has no field for
    prompt: PromptForm | None = None  # how its training data wrote prompts; None where nobody knows
    package: Text | None = None  # what has its method, where loraloom lacks it


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as its files describe it, before it meets a base model."""

    layout: str
    config: AdapterConfig
    """`target_modules` are those that the files list, or the last words of what has tensors."""
    tensors: dict[str, Tensor]  # by our keys (tensor_names.py)
    base: BaseRecord
    source: str
    prompt: PromptForm | None = None
    has_single_experts: bool = False
    """Whether the files have gate and up of each expert apart."""
    listed: tuple[str, ...] = ()
    """Targets of other programs' layouts, whose linear layers must all have tensors."""
    listed_layers: tuple[int, ...] | None = None
    """The decoder layers in which they must; None: all."""


def parse(files: AdapterFiles, method: type[AdapterConfig]) -> StoredAdapter:
    if files.config.get("task_type") not in (None, "CAUSAL_LM", "QUESTION_ANS"):
        raise files.error(f"`task_type` must be CAUSAL_LM, got {shown(files.config['task_type'])}")
    if method.layout != "native" and files.config.get("bias", "none") != "none":
        raise files.error(
            f"`bias` must be none, got {shown(files.config['bias'])}; train with bias='none', or "
            "merge the biases into the base model"
        )
    files = _with_whole_tables(files)
    is_apart = has_single_experts(files)
    if files.config.get("target_parameters"):
        files = read_stacks(files)
    elif is_apart:
        files = stack_experts(files)
    tensors = _our_tensors(files, method)
    config = read_config(files, method, tensors)
    record = _record(files, method)
    name = str(files.config.get("base_model_name_or_path") or "")
    listed, listed_layers = listed_targets(files) if method.layout != "native" else ((), None)
    return StoredAdapter(
        layout=LABELS[method.layout],
        config=config,
        tensors=tensors,
        base=record.base.model_copy(update={"name_or_path": plain(name) or None}),
        source=files.source,
        prompt=record.prompt,
        has_single_experts=is_apart,
        listed=listed,
        listed_layers=listed_layers,
    )


def render(
    config: AdapterConfig,
    tensors: Mapping[str, Tensor],
    base: BaseInfo,
    prompt: PromptForm | None = None,
) -> AdapterFiles:
    record = _describe(config, base, prompt)
    fields: dict[str, Any] = {
        "peft_type": config.peft_type,
        "base_model_name_or_path": base.name_or_path or None,
        "task_type": "CAUSAL_LM",
    }
    if config.layout == "peft":
        fields |= {"inference_mode": True, "revision": None}
    fields |= write_fields(config, base)
    if config.layout != "peft":
        fields["loraloom"] = record | fields.get("loraloom", {})
    if config.layout == "reference" and not base.name_or_path:
        del fields["base_model_name_or_path"]
    fields |= write_own_fields(config, base)
    # PEFT would drop the record from the configuration.
    header = record if config.layout == "peft" else {}
    # transformers refuses a file without a format.
    metadata = {"format": "pt", RECORD: json.dumps(header, sort_keys=True)}
    named = {_their_name(key, config, base): tensor for key, tensor in tensors.items()}
    if config.layout == "peft":
        named = write_stacks(named)
    return AdapterFiles(fields, named, metadata)


def _describe(config: AdapterConfig, base: BaseInfo, prompt: PromptForm | None) -> dict[str, Any]:
    fields = {name: getattr(base, name) or None for name in BaseRecord.model_fields}
    package = config.package or None
    record = AdapterRecord(base=BaseRecord(**fields), prompt=prompt, package=package)
    # Both have a field of their own in the files.
    left_out = {"adapter": True, "base": {"name_or_path"}}
    return record.model_dump(mode="json", exclude_none=True, exclude=left_out)


def _our_tensors(files: AdapterFiles, method: type[AdapterConfig]) -> dict[str, Tensor]:
    """Name tensors by our keys."""
    endings = _ENDINGS.get(method.peft_type, _ENDINGS.get(method.layout, {}))
    our_parts = {theirs.removesuffix(".weight"): ours for ours, theirs in endings.items()}
    pattern = _tensor_pattern(method, list(our_parts))
    keys: dict[str, str] = {}
    unknown: list[str] = []
    paths: set[str] = set()
    for name in files.tensors:
        key = None
        match = pattern.fullmatch(name)
        if match is not None:
            our_part = our_parts.get(match["part"], match["part"])
            key = TensorKey.parse(f"layers.{match['block']}{our_part}")
        if match is not None and key is not None:
            keys[name] = str(key)
            if method.layout == "peft":
                paths.add(match["path"])
            continue
        other_key = _key_outside_layers(name, method, our_parts)
        if other_key is not None:
            keys[name] = other_key
        elif not _COPY.search(name):
            unknown.append(name)
    if unknown:
        raise files.error(
            f"unexpected tensors: {names_in(unknown)}; they are not a {method.peft_type} "
            "adapter's on projections of decoder layers, which alone are adapted here"
        )
    if len(paths) > 1:
        raise files.error(
            f"tensors must belong to one stack of decoder layers, got {names_in(sorted(paths))}; "
            "adapters of several parts of a model are not supported"
        )
    return files.renamed(keys)


def _key_outside_layers(
    name: str, method: type[AdapterConfig], our_parts: Mapping[str, str]
) -> str | None:
    path = name.removeprefix(_PREFIX)  # of the base model's module, if that is one
    shared_part = name.removeprefix(_SHARED[method.layout])
    if method.layout == "native" and path != name and path.startswith("experts."):
        return path
    if shared_part != name and (shared_part in our_parts or not our_parts):
        return f"shared.{our_parts.get(shared_part, shared_part)}"
    if path != name and path.endswith(_TOKENS):
        return f"{TOKENS}{path.removesuffix(_TOKENS)}"
    if path != name and _WHOLE.fullmatch(path) and not _COPY.search(name):
        return f"{MODULES}{path}"
    return None


def _tensor_pattern(method: type[AdapterConfig], parts: Sequence[str]) -> re.Pattern[str]:
    """Match the names of a layer's tensors, with what they end by in a method's files."""
    prefix = {
        "peft": r"base_model\.model\.(?P<path>(?:\w+\.)*?\w+)",
        "reference": rf"{re.escape(method.peft_type.lower())}\.layers",
        "native": r"base_model\.model\.layers",
    }[method.layout]
    block = r"(?P<block>\d{1,5}\.(?:\w+\.){1,4}?(?:experts\.\d{1,5}\.)?)"
    # Our own names end in no `.weight`; there that is a module's parameter.
    ending = rf"(?P<part>{'|'.join(parts)})(?:\.weight)?" if parts else r"(?P<part>\w+)"
    return re.compile(rf"{prefix}\.{block}{ending}", re.ASCII)


def _their_name(name: str, config: AdapterConfig, base: BaseInfo) -> str:
    """Name a tensor as files have it; the reverse of `_our_tensors`."""
    if name.startswith(MODULES):
        return f"{_PREFIX}{name.removeprefix(MODULES)}"
    if name.startswith(TOKENS):
        return f"{_PREFIX}{name.removeprefix(TOKENS)}{_TOKENS}"
    if config.layout == "native":
        return f"{_PREFIX}{name}"
    endings = _ENDINGS.get(config.peft_type, _ENDINGS[config.layout])
    key = TensorKey.parse(name)
    if key is None:
        return f"base_model.{endings[name.removeprefix('shared.')]}"
    prefix = f"{config.peft_type.lower()}.layers"
    if config.layout == "peft":
        prefix = f"{_PREFIX}{base.layers_path}"
    theirs = str(replace(key, part=endings[key.part]))
    return f"{prefix}{theirs.removeprefix('layers')}"


def _record(files: AdapterFiles, method: type[AdapterConfig]) -> AdapterRecord:
    origin = f"{files.source}: `loraloom`"
    fields = files.section("loraloom")
    if method.layout == "peft":
        origin = f"{origin} in the weights' header"
        fields = parse_json(files.metadata.get(RECORD, "{}"), origin, FormatError)
    record = checked(AdapterRecord, fields, FormatError, f"{origin}: ")
    if record.version != RECORD_VERSION:
        raise files.error(
            f"written by a newer loraloom (version of the record must be {RECORD_VERSION}, got "
            f"{record.version}); upgrade loraloom"
        )
    return record


def _with_whole_tables(files: AdapterFiles) -> AdapterFiles:
    """Put tokens' rows into the resized tables that PEFT saves beside them."""
    tables = [name.removesuffix(_TABLE) for name in files.tensors if name.endswith(_TABLE)]
    if not tables:
        return files
    config = dict(files.config)
    indices = config.pop("trainable_token_indices", None) or []
    tensors = dict(files.tensors)
    all_rows = [tensors.pop(name) for name in files.tensors if name.endswith(_TOKENS)]
    for path in tables:
        table = tensors.pop(f"{path}{_TABLE}")
        tokens = indices
        if isinstance(indices, dict):
            meant = [tokens for name, tokens in indices.items() if is_meant(name, path)]
            tokens = next(iter([*meant, *indices.values()]), [])
        # A table that is tied to another one has no rows of its own.
        rows = files.tensors.get(f"{path}{_TOKENS}", next(iter(all_rows), None))
        if rows is None:
            raise files.error(f"the tensor {path}{_TOKENS} is missing")
        tensors[f"{path}.weight"] = table.index_copy(0, torch.tensor(tokens), rows.to(table.dtype))
    return replace(files, config=config, tensors=tensors)
